"""Prompts to calibrate on: JSON lines with a question, its images and perhaps the answer, turned into token ids and tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import CalibrationError, MmmError
from mmm_export.images import load_image, tiles_from_image
from mmm_export.spec import ModelSpec
from mmm_export.text import Tokenizer, chat_prompt

MAX_LINE_BYTES = 16 << 20
WANTED = (
    '{"prompt": "...", "images": ["file", ...], "answer": "..."}, or InternVL\'s {"image": ..., "conversations": [...]}'
)


@dataclass(frozen=True)
class Prompt:
    """One line of a data file; `images` are paths as written there."""

    line: int
    question: str
    images: tuple[str, ...]
    answer: str | None


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


def read_prompts(path: Path, limit: int) -> tuple[Prompt, ...]:
    """Read up to `limit` prompts; blank lines do not count.

    Raises:
        CalibrationError: no such file, nothing in it, or a line that is no prompt, by its number.
    """
    prompts: list[Prompt] = []
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt(line, number, path))
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read", found=error.strerror, wanted="a file of JSON lines", hint=f"one line: {WANTED}"
        ) from error
    if not prompts:
        raise CalibrationError(f"{path} has no prompts", found="no lines with content", wanted=WANTED)
    return tuple(prompts)


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


def _prompt(line: bytes, number: int, path: Path) -> Prompt:
    def broken(found: str) -> CalibrationError:
        return CalibrationError(f"line {number} of {path} is broken", found=found, wanted=WANTED)

    if len(line) > MAX_LINE_BYTES:
        raise broken(f"more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise broken(f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(data, dict):
        raise broken(f"{data!r:.80}")
    try:
        question, answer = _texts(data)
        images = _images(data)
        for text in (question, answer or "", *images):
            text.encode()  # JSON may hold halves of characters
    except (TypeError, KeyError, ValueError) as error:
        raise broken(f"{error}"[:200]) from error
    if not question.strip():
        raise broken("an empty prompt")
    if any("\0" in name for name in images):
        raise broken("an image path with a NUL")
    return Prompt(number, question, images, answer)


def _texts(data: dict[str, Any]) -> tuple[str, str | None]:
    """Question and answer of a line; of a conversation those of its first turn."""
    if "conversations" in data:
        turns = data["conversations"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise TypeError("conversations is no list of turns")
        spoken = [turn for turn in turns if turn.get("from") != "system"]
        if not spoken or spoken[0].get("from") not in ("human", "user"):
            raise ValueError("conversations has no turn from human")
        answers = [turn for turn in spoken[1:2] if turn.get("from") in ("gpt", "assistant")]
        return _text(spoken[0], "value"), _text(answers[0], "value") if answers else None
    if "prompt" not in data:
        raise KeyError("neither prompt nor conversations in it")
    return _text(data, "prompt"), None if data.get("answer") is None else _text(data, "answer")


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r:.60}, not text")
    return value


def _images(data: dict[str, Any]) -> tuple[str, ...]:
    images = data.get("images", data.get("image"))
    if images is None:
        return ()
    if isinstance(images, str):
        return (images,)
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise TypeError(f"images is {images!r:.60}, not a list of paths")
    return tuple(images)
