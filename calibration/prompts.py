"""Prompts to calibrate on, turned into token ids and tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import CalibrationError, MmmError
from mmm_export.images import load_image, tiles_from_image
from mmm_export.prompt_file import Prompt
from mmm_export.spec import ModelSpec
from mmm_export.text import Tokenizer, chat_prompt


@dataclass(frozen=True)
class Sample:
    """A prompt as the model reads it.

    `input_ids` (T,) int64, the answer's included; the first `prompt_tokens` of them are read in chunks, the others one by one.
    `pixel_values` (tiles, 3, S, S) float32. `label` names it in messages.
    """

    label: str
    input_ids: NDArray[np.int64]
    prompt_tokens: int
    pixel_values: NDArray[np.float32]


def data_sha256(prompts: tuple[Prompt, ...]) -> str:
    """Identity of the prompts that were read; images count by their path."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.question, prompt.images, prompt.answer]).encode())
    return digest.hexdigest()


def samples_from_prompts(
    prompts: tuple[Prompt, ...], path: Path, spec: ModelSpec, tokenizer: Tokenizer, *, step_tokens: int
) -> Iterator[Sample]:
    """Encode prompts one after the other.

    Args:
        prompts: as `read_prompts` gives them.
        path: of the data file; relative image paths begin at its folder.
        spec: the model.
        tokenizer: the bundle's.
        step_tokens: without an answer the last so many tokens of the prompt are read one by one in its place.

    Raises:
        CalibrationError: a prompt or image cannot be used, by its line.
    """
    for prompt in prompts:
        try:
            parts = [tiles_from_image(load_image(path.parent / name), spec.vision) for name in prompt.images]
            text = chat_prompt(
                prompt.question,
                tile_counts=[len(part) for part in parts],
                tokens_per_tile=spec.vision.tokens_per_tile,
            )
            asked = tokenizer.encode(text)
            # With the text before it: alone it would begin with the space that the tokenizer puts before every text.
            whole = tokenizer.encode(text + prompt.answer) if prompt.answer else asked
            answer = whole[len(asked) :] if whole[: len(asked)] == asked else tokenizer.encode(prompt.answer or "")
        except (MmmError, ValueError) as error:
            found = error.what if isinstance(error, MmmError) else str(error)
            raise CalibrationError(
                f"line {prompt.line} of {path} cannot be used", found=found, hint="mend or remove the line"
            ) from error
        S = spec.vision.tile_size
        pixels = np.concatenate(parts) if parts else np.zeros((0, spec.vision.channels, S, S), np.float32)
        ids = np.asarray([*asked, *answer], np.int64)
        read = len(asked) if answer else max(1, len(asked) - step_tokens)
        yield Sample(f"line {prompt.line}", ids, read, pixels.astype(np.float32, copy=False))
