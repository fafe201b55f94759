"""A checkpoint folder, open for reading: its dimensions at once, its tensors by memory map when they are asked for."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmm_export import names
from mmm_export.errors import CheckpointError, MissingPackageError
from mmm_export.manifest import Dtype
from mmm_export.model import tensors
from mmm_export.model.config import read_config
from mmm_export.model.model_spec import RopePolicy, model_spec
from mmm_export.model.shards import stored_tensors
from mmm_export.model.stored import DTYPES, StoredTensor, float_values
from mmm_export.model.tokenizer_check import check_tokenizer
from mmm_export.progress import Progress, SilentProgress
from mmm_export.spec import ModelSpec

if TYPE_CHECKING:
    import torch

HASH_BLOCK_BYTES = 1 << 22
DTYPE_LABELS: dict[str, Dtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Checkpoint:
    """An mmMamba checkpoint: config.json, safetensors files, and perhaps a tokenizer. Made by `Checkpoint.open`.

    Attributes:
        folder: where it is.
        spec: dimensions, layer kinds, image geometry.
        config: config.json as it is.
        findings: sentences about contradictions that were resolved and values that were assumed.
        dtype: number format of most of its values.
        files: the safetensors files, in order.
        parameters: number of stored values.
        head_name: tensor of the output head, (vocab, hidden): `language_model.output.weight`, or the tied token table.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        config: dict[str, Any],
        stored: Mapping[str, StoredTensor],
        files: tuple[Path, ...],
        *,
        head_name: str,
        findings: tuple[str, ...],
        dtype: Dtype,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.config = config
        self.files = files
        self.head_name = head_name
        self.findings = findings
        self.dtype = dtype
        self.parameters = sum(tensor.values for tensor in stored.values())
        self._stored = stored
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path | str, *, rope_scaling: RopePolicy = "ignore") -> Checkpoint:
        """Read config.json, the headers of the safetensors files, and the tokenizer. Needs no torch.

        Args:
            folder: the checkpoint folder.
            rope_scaling: "ignore" runs attention layers without RoPE scaling, as the released hybrid does; "teacher"
                follows config.json, as its teacher does.

        Raises:
            CheckpointError: not a checkpoint, damaged, contradictory, or of a model that is not supported.
            MmmError: the tokenizer is damaged.
        """
        folder = Path(folder)
        config = read_config(folder)
        stored, files, findings = stored_tensors(folder)
        described = model_spec(config, stored, rope_scaling)
        findings.extend(described.findings)
        dtype = _dtype(stored, config.text("torch_dtype") or config.text("dtype"), findings)
        findings.extend(_lossy_conversion(described.spec, stored))
        findings.extend(check_tokenizer(folder, described.spec))
        return cls(
            folder,
            described.spec,
            config.data,
            stored,
            files,
            head_name=described.head,
            findings=tuple(findings),
            dtype=dtype,
        )

    def names(self) -> frozenset[str]:
        """Names of all stored tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored. Raises CheckpointError for an unknown name."""
        return self._tensor(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """Give a tensor in its stored dtype and layout, memory-mapped: its values are read when they are used.

        Raises:
            CheckpointError: unknown name, or the file changed since it was opened.
            MissingPackageError: torch is not installed.
        """
        file = self._tensor(name).file
        try:
            with self._lock:
                if file not in self._handles:
                    from safetensors import safe_open

                    # Kept open: each open maps the file and parses its header again.
                    self._handles[file] = safe_open(str(file), framework="pt")
            value: torch.Tensor = self._handles[file].get_tensor(name)
        except ImportError as error:
            raise MissingPackageError("reading tensors needs torch", hint='pip install "mmm-export[export]"') from error
        except Exception as error:  # safetensors raises its own class, which is no ValueError
            raise CheckpointError(
                f"tensor {name} of {file} cannot be read",
                found=f"{type(error).__name__}: {error}",
                wanted="the file as it was when the checkpoint was opened",
            ) from error
        return value

    def sha256(self, progress: Progress | None = None) -> str:
        """Hash the content of config.json and of every safetensors file, in order; file names do not matter.

        Args:
            progress: told the bytes read.
        """
        paths = (self.folder / names.CONFIG_FILE, *self.files)
        digest = hashlib.sha256()
        total = sum(path.stat().st_size for path in paths)
        with (progress or SilentProgress()).stage("Hash the checkpoint", total) as advance:
            for path in paths:
                content = hashlib.sha256()
                with path.open("rb", buffering=0) as stream:
                    while block := stream.read(HASH_BLOCK_BYTES):
                        content.update(block)
                        advance(len(block))
                digest.update(content.digest())
        return digest.hexdigest()

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._stored[name]


def _dtype(stored: Mapping[str, StoredTensor], label: str | None, findings: list[str]) -> Dtype:
    """Settle the number format: that of most values; adds to `findings` several formats and a wrong label."""
    values: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.format in DTYPES:
            values[tensor.format] += tensor.values
    dtype = DTYPES[values.most_common(1)[0][0]]
    if len(values) > 1:
        counts = ", ".join(f"{count} values in {DTYPES[format_]}" for format_, count in values.most_common())
        findings.append(f"the tensors have several number formats: {counts}")
    if label is not None and DTYPE_LABELS.get(label.removeprefix("torch.")) != dtype:
        findings.append(f"config.json: torch_dtype is {label!r:.40}, the tensors are {dtype} and decide")
    return dtype


def _lossy_conversion(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Recognise a conversion that lost dt_bias and A_log_bias: it leaves the latter at exactly 1 everywhere."""
    if not spec.mamba_layers:
        return []
    for layer in spec.mamba_layers:
        values = float_values(stored[tensors.layer_prefix(spec, layer) + "attention.A_log_bias"])
        if not np.all(values == 1.0):
            return []
    return [
        "A_log_bias is 1.0 in every mamba2 layer: the conversion lost the trained values, and dt_bias is then random; "
        "convert again, with the checkpoint of the training stage before the last"
    ]
