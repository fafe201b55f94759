"""From a trained network to a checkpoint folder in the released layout, which every other command takes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmm_export import names
from mmm_export.manifest import Dtype
from mmm_export.model.shards import SINGLE_FILE
from mmm_export.model.tensors import Shape
from mmm_export.model.testing.released_config import TORCH_DTYPES
from mmm_export.model.testing.writer import write_safetensors
from mmm_export.spec import ModelSpec

BLOCK_VALUES = 1 << 22  # 16 MiB of float32 at a time
TOKENIZER_FILES = (
    names.TOKENIZER_MODEL_FILE,
    names.ADDED_TOKENS_FILE,
    names.TOKENIZER_CONFIG_FILE,
    names.SPECIAL_TOKENS_FILE,
)
Lazy = Callable[[], Tensor]


def write_student(
    folder: Path,
    spec: ModelSpec,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    tensor: Callable[[str], Tensor],
    *,
    dtype: Dtype,
    tokenizer: Path | None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write config.json, one safetensors file and the tokenizer's files into an existing folder.

    Args:
        folder: where.
        spec: of the student; its layer kinds go into config.json.
        config: config.json of the teacher, the rest of which is kept.
        shapes: of every tensor, by stored name.
        tensor: gives one of them; called once for each, from several threads.
        dtype: number format of all tensors.
        tokenizer: a folder whose tokenizer files are copied, None for none.
        advance: told the values written since the last call.
    """

    def blocks(name: str) -> Iterator[NDArray[np.float32]]:
        value = tensor(name).detach()
        rows = max(1, BLOCK_VALUES // max(1, value[0].numel())) if value.dim() else 1
        for part in torch.split(value, rows) if value.dim() else (value,):
            yield cast("NDArray[np.float32]", part.to("cpu", torch.float32).contiguous().numpy().reshape(-1))
            advance(part.numel())

    layout: dict[str, tuple[Dtype, Shape]] = {name: (dtype, tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(folder / SINGLE_FILE, layout, blocks)
    text = json.dumps(student_config(spec, config, dtype), indent=4, ensure_ascii=False)
    (folder / names.CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)


def student_config(spec: ModelSpec, teacher: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """Give the student's config.json: the teacher's, but with the student's layer kinds and class names."""
    config = copy.deepcopy(dict(teacher))
    label = TORCH_DTYPES[dtype]
    config |= {"architectures": "mmMambaChatModel", "model_type": "mmMamba_chat", "torch_dtype": label}
    config.pop("layers_block_type", None)  # very early conversions had one for both parts
    classes = (("embedding_config", spec.embedding, "mmMamba_embedding"), ("llm_config", spec.llm, "mmMamba"))
    for part, stack, model_type in classes:
        section = config[part]
        section |= {"layers_block_type": list(stack.kinds), "model_type": model_type, "torch_dtype": label}
    return config
