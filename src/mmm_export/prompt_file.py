"""A file of prompts: JSON lines with a question, its images and perhaps the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmm_export.errors import PromptFileError

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


def read_prompts(path: Path, limit: int | None = None) -> tuple[Prompt, ...]:
    """Read up to `limit` prompts, all for None; blank lines do not count.

    Raises:
        PromptFileError: no such file, nothing in it, or a line that is no prompt, by its number.
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
        raise PromptFileError(
            f"{path} cannot be read", found=error.strerror, wanted="a file of JSON lines", hint=f"one line: {WANTED}"
        ) from error
    if not prompts:
        raise PromptFileError(f"{path} has no prompts", found="no lines with content", wanted=WANTED)
    return tuple(prompts)


def _prompt(line: bytes, number: int, path: Path) -> Prompt:
    def broken(found: str) -> PromptFileError:
        return PromptFileError(f"line {number} of {path} is broken", found=found, wanted=WANTED)

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
