"""Writes a checkpoint folder in the released layout, tensor by tensor, so that any size fits in little memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.manifest import Dtype
from mmm_export.model import tensors
from mmm_export.model.testing.released_config import config_from_spec, overridden
from mmm_export.model.testing.vocabulary import write_tokenizer
from mmm_export.model.testing.weights import Values, tensor_blocks
from mmm_export.spec import ModelSpec

Array = NDArray[Any]
STORED_DTYPES: dict[Dtype, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: Dtype = "bf16",
    shards: int = 1,
    tokenizer: Path | Literal[False] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    layers_block_type: bool = True,
    drop: Collection[str] = (),
    extra: Mapping[str, Array] | None = None,
    dtypes: Mapping[str, Dtype] | None = None,
) -> Path:
    """Write a checkpoint with seeded random weights and return its folder.

    The same seed gives a tensor the same values (rounded to the dtype), whatever the sharding and the other tensors.

    Args:
        folder: created with its parents; files of the same names are replaced.
        spec: the model. Its vocab_size must be the tokenizer's pieces plus fifteen (`vocab_size_for`).
        seed: of the weights.
        dtype: number format of the weights.
        shards: files to spread the weights over; with more than one an index is written.
        tokenizer: a tokenizer.model to copy, None to train a small one, False for a checkpoint without tokenizer.
        config_overrides: changes to config.json: nested or dotted keys; ABSENT removes one.
        layers_block_type: whether config.json states the layer kinds.
        drop: names of tensors to leave out.
        extra: float tensors to add, or to replace by name, stored in `dtype`.
        dtypes: number formats of single tensors by name, where they differ from `dtype`.

    Raises:
        OptionError: tokenizer and vocab_size do not fit.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_from_spec(spec, dtype=dtype, layers_block_type=layers_block_type)
    text = json.dumps(overridden(config, config_overrides or {}), indent=4, ensure_ascii=False)
    (folder / names.CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if tokenizer is not False:
        write_tokenizer(folder, spec.vocab_size, tokenizer)

    replaced = dict(extra or {})
    shapes = tensors.required_shapes(spec) | tensors.unused_shapes(spec)
    shapes |= {name: value.shape for name, value in replaced.items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in drop}
    formats = {name: (dtypes or {}).get(name, dtype) for name in shapes}

    def blocks(name: str) -> Iterator[Array]:
        if name in replaced:
            return iter([np.asarray(replaced[name], dtype=np.float32).reshape(-1)])
        return tensor_blocks(spec, name, shapes[name], seed)

    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    parts = {file: list(shapes)[i::shards] for i, file in enumerate(files)}
    if shards > 1:
        weight_map = {name: file for file, part in parts.items() for name in part}
        total = sum(math.prod(shapes[name]) * BYTES[formats[name]] for name in shapes)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, part in parts.items():
        write_safetensors(folder / file, {name: (formats[name], shapes[name]) for name in part}, blocks)
    return folder


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[Dtype, tensors.Shape]], blocks: Callable[[str], Iterator[Values]]
) -> None:
    """Write one safetensors file without ever holding a whole tensor.

    Args:
        path: replaced if it exists.
        layout: dtype and shape of every tensor by name.
        blocks: gives the float32 values of a tensor in row-major order, in pieces; called from several threads.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Widest first, as the safetensors library does, so that every tensor is aligned to its own values.
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -BYTES[item[1][0]]):
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": STORED_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(data + end)
        stream.flush()

        def write(name: str) -> None:
            offset = data + header[name]["data_offsets"][0]
            for values in blocks(name):
                encoded = memoryview(stored_bytes(values, layout[name][0]))
                while encoded:
                    written = os.pwrite(stream.fileno(), encoded, offset)
                    encoded, offset = encoded[written:], offset + written

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy and pwrite release the interpreter lock
            list(pool.map(write, sorted(layout, key=lambda name: -math.prod(layout[name][1]))))


def stored_bytes(values: Values, dtype: Dtype) -> bytes:
    """Round float32 values to `dtype`, nearest even, and give their little-endian bytes."""
    if dtype == "fp32":
        return values.astype("<f4", copy=False).tobytes()
    if dtype == "fp16":
        return values.astype("<f2").tobytes()
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return bytes(rounded.astype("<u2"))
