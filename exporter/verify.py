"""Prove that a bundle computes what its checkpoint computes: float64, PyTorch and ONNX Runtime on the same input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import BundleError, OptionError, PromptError
from mmm_export.exporter.comparison import layer_bounds, logits_bounds, quantized_format, split_bounds
from mmm_export.exporter.golden_recording import PROMPT, pattern_tile, spread_ids
from mmm_export.exporter.recorded import Example
from mmm_export.exporter.recording import BundleRecorder, record_torch
from mmm_export.exporter.verify_report import (
    ORACLE_TO_ORT,
    ORACLE_TO_TORCH,
    TORCH_TO_ORT,
    VerifyReport,
    check_tokens,
    compare_prefill,
    compare_split,
    compare_steps,
)
from mmm_export.images import load_image, tiles_from_image
from mmm_export.manifest import Manifest, check_files, read_manifest
from mmm_export.model import scan
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.weights import load_model
from mmm_export.names import TOKENIZER_MODEL_FILE
from mmm_export.operator_library import CPU_PROVIDER, choose_library
from mmm_export.progress import Progress, SilentProgress
from mmm_export.text import Tokenizer, chat_prompt


@dataclass(frozen=True)
class VerifyOptions:
    """What to run.

    Attributes:
        prompt: a question; a default one is used when None.
        images: image files; without any a generated pattern of one tile stands in, so that the image path is always run.
        new_tokens: greedy tokens to compare after the prompt.
        split_tokens: how many of the prompt's last tokens are fed one by one in the prefill-then-step check.
        float64: also run a float64 reference and hold both sides against it.
        kernels: what computes the scan in ONNX Runtime: "auto", "none" or a library, see `choose_library`.
    """

    prompt: str | None = None
    images: tuple[Path, ...] = ()
    new_tokens: int = 8
    split_tokens: int = 5
    float64: bool = True
    kernels: str | Path = "auto"

    def __post_init__(self) -> None:
        for name, value, least in (("new_tokens", self.new_tokens, 0), ("split_tokens", self.split_tokens, 1)):
            if value < least:
                raise OptionError(f"{name} is too small", found=str(value), wanted=f"at least {least}")


def verify_bundle(
    bundle: Path | str,
    checkpoint: Path | str,
    options: VerifyOptions | None = None,
    *,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run a bundle and its checkpoint on one input and compare them.

    Weights stay memory-mapped on the PyTorch side; the recordings are taken one after the other, so a model that fits ONNX
    Runtime fits this.

    Raises:
        BundleError: the bundle is damaged or was made from another checkpoint.
        CheckpointError, PromptError, ImageError: the inputs cannot be used.
        OptionError, KernelError: there is no such kernel library, or ONNX Runtime cannot use it.
    """
    options = options or VerifyOptions()
    progress = progress or SilentProgress()
    folder = Path(bundle)
    manifest = read_manifest(folder)
    with progress.stage("check files"):
        check_files(folder, manifest)
        source = open_source(Path(checkpoint), manifest)
    example, stand_ins = prompt_example(folder, manifest, options)
    if manifest.max_tokens and len(example.input_ids) + options.new_tokens > manifest.max_tokens:
        raise PromptError(
            "the prompt does not fit the KV cache of the bundle",
            found=f"{len(example.input_ids)} tokens and {options.new_tokens} new ones",
            wanted=f"at most {manifest.max_tokens}",
            hint="use a shorter prompt, or export with a larger --max-tokens",
        )
    oracle = None
    if options.float64:
        with progress.stage("run float64 reference"):
            oracle, _ = record_torch(load_model(source, dtype=torch.float64, scan=scan.sequential), example)
    with progress.stage("run PyTorch"):
        wanted, forced = record_torch(load_model(source), example, new_tokens=options.new_tokens)
    with progress.stage("load ONNX Runtime"):
        library = choose_library(options.kernels, manifest, [CPU_PROVIDER])
        recorder = BundleRecorder(folder, manifest, library)
    with progress.stage("run ONNX Runtime"):
        found = recorder.record(example, forced=forced)
        split = max(1, len(example.input_ids) - options.split_tokens)
        parted = recorder.record(example, split=split)
    quantized = quantized_format(manifest)
    rows = [
        *compare_prefill(TORCH_TO_ORT, found, wanted, logits_bounds(manifest.dtype, quantized), ()),
        *compare_steps(found, wanted, logits_bounds(manifest.dtype, quantized)),
        *compare_split(parted, found, split_bounds(manifest.dtype, quantized)),
    ]
    if oracle is not None:
        rows += compare_prefill(ORACLE_TO_ORT, found, oracle, (), layer_bounds(manifest.dtype, quantized))
        rows += compare_prefill(ORACLE_TO_TORCH, wanted, oracle, (), layer_bounds("fp32"))
    return VerifyReport(
        str(folder),
        str(checkpoint),
        manifest,
        len(example.input_ids),
        int((example.input_ids == manifest.model.image_token_id).sum()),
        tuple(rows),
        check_tokens(found, wanted, forced, manifest),
        (*stand_ins, *_notes(manifest, library)),
    )


def open_source(folder: Path, manifest: Manifest | EngineManifest) -> Checkpoint:
    scaled = any(stack.rope.scaling != "none" for stack in (manifest.model.embedding, manifest.model.llm))
    source = Checkpoint.open(folder, rope_scaling="teacher" if scaled else "ignore")
    identity = source.sha256()
    if identity != manifest.source_sha256:
        raise BundleError(
            "the bundle was not made from this checkpoint",
            found=f"{folder}, sha256 {identity[:16]}",
            wanted=f"{manifest.source}, sha256 {manifest.source_sha256[:16]}",
            hint="give the checkpoint that was exported, or export again",
        )
    return source


def prompt_example(
    folder: Path, manifest: Manifest | EngineManifest, options: VerifyOptions
) -> tuple[Example, list[str]]:
    """Token ids and tiles of the prompt and images asked for, or stand-ins; and a sentence for each stand-in."""
    spec = manifest.model
    notes = []
    parts = [tiles_from_image(load_image(path), spec.vision) for path in options.images]
    if not parts:
        parts = [pattern_tile(spec)]
        notes.append("No image was given: a generated pattern of one tile stood in.")
    asked = options.prompt is not None or bool(options.images)
    if not asked and not (folder / TOKENIZER_MODEL_FILE).is_file():
        # A checkpoint may come without a tokenizer; its graphs can still be checked.
        notes.append("The bundle has no tokenizer: token ids spread over the vocabulary stood in for a prompt.")
        ids = spread_ids(spec)
    else:
        text = chat_prompt(
            PROMPT if options.prompt is None else options.prompt,
            tile_counts=[len(part) for part in parts],
            tokens_per_tile=spec.vision.tokens_per_tile,
        )
        ids = Tokenizer.from_folder(folder).encode(text)
    return Example(np.asarray(ids, dtype=np.int64), np.concatenate(parts)), notes


def _notes(manifest: Manifest, library: Path | None) -> tuple[str, ...]:
    notes = []
    if manifest.quantization is not None:
        notes.append(
            f"The decoder is quantized to {manifest.quantization.format}: the bounds are those of that format."
        )
    if library is not None:
        notes.append(f"The scan was computed by {library}, not by the function body in the graph.")
    if manifest.dtype == "bf16":
        notes.append("ONNX Runtime has no bfloat16 arithmetic on a CPU: the bfloat16 weights were run in float32 here.")
    return tuple(notes)
