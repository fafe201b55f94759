"""From one line of a data file to token ids, the tokens that are answers, and image tiles.

A line is a JSON object as InternVL has it: `conversations`, a list of {"from": "human" | "gpt" | "system", "value": text}, and
`image`, a path or a list of paths, absent in text-only samples. Each `<image>` in the texts stands for the next image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.errors import MmmError
from mmm_export.images import load_image, tiles_from_image
from mmm_export.spec import ModelSpec
from mmm_export.text import Tokenizer
from mmm_export.text.prompt import DEFAULT_SYSTEM, IMAGE_END, IMAGE_MARK, IMAGE_START, TURN_END, TURN_START

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(MmmError):
    """Training data cannot be used."""


class SampleError(DataError):
    """A sample cannot be used. `reason` is one of a few words, for counting."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"a sample is unusable: {reason}", found=found)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One message: role "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A checked line: turns that end with the assistant's, and as many images as marks."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """What the model reads. Shapes: ids (T,) int32; answers (T,) bool; pixels (tiles, 3, S, S) float32."""

    ids: NDArray[np.int32]
    answers: NDArray[np.bool_]
    pixels: NDArray[np.float32]


def read_line(line: bytes) -> Conversation:
    """Read and check a line. Raises SampleError."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError("no JSON", str(error)[:100]) from error
    if not isinstance(data, dict):
        raise SampleError("no JSON object", type(data).__name__)
    turns = _turns(data.get("conversations"))
    given = data.get("image")
    images = [] if given in (None, "", []) else given if isinstance(given, list) else [given]
    if not all(isinstance(image, str) and image and "\0" not in image for image in images):
        raise SampleError("image is no path", repr(given)[:100])
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if images and not marks:
        raise SampleError("no image mark", f"{len(images)} images, no {IMAGE_MARK} in the conversation")
    if marks != len(images):
        raise SampleError("image marks and images disagree", f"{marks} {IMAGE_MARK}, {len(images)} images")
    if any(turn.role != "user" and IMAGE_MARK in turn.text for turn in turns):
        raise SampleError("image mark outside a question", "it in an answer or the system's text")
    if any(names.IMAGE_TOKEN in turn.text for turn in turns):
        raise SampleError("image token in a text", names.IMAGE_TOKEN)
    return Conversation(turns, tuple(images))


def _turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise SampleError("no conversation", "conversations absent" if value is None else type(value).__name__)
    turns = []
    for message in value:
        role = ROLES.get(str(message.get("from"))) if isinstance(message, dict) else None
        text = message.get("value") if role else None
        if role is None or not isinstance(text, str):
            raise SampleError("unknown message", repr(message)[:100])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SampleError("text is not valid Unicode", f"character {error.start}") from error
        turns.append(Turn(role, text))
    start = 1 if turns and turns[0].role == "system" else 0
    wanted = ("user", "assistant")
    if (
        len(turns) <= start
        or len(turns[start:]) % 2
        or any(turn.role != wanted[i % 2] for i, turn in enumerate(turns[start:]))
    ):
        raise SampleError("turns out of order", " ".join(turn.role for turn in turns[:6]) or "no message")
    if not all(turn.text.strip() for turn in turns[start:]):
        raise SampleError("empty message", "a question or an answer without text")
    return tuple(turns)


def token_ids(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tile_counts: Sequence[int],
    tokens_per_tile: int,
    system: str | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokenise a conversation in the model's chat template.

    Args:
        conversation: a checked one.
        tokenizer: of the model.
        tile_counts: tiles of each image.
        tokens_per_tile: vectors the model makes of one tile.
        system: system text where the conversation has none; None for the default.

    Returns:
        ids (T,), and answers (T,), true for the tokens of the answers and the end of their turns.
    """
    turns = conversation.turns
    if turns[0].role != "system":
        turns = (Turn("system", DEFAULT_SYSTEM if system is None else system), *turns)
    counts = iter(tile_counts)
    ids: list[int] = []
    answers: list[bool] = []
    for i, turn in enumerate(turns):
        first, *rest = turn.text.split(IMAGE_MARK)
        text = first
        for part in rest:
            text += IMAGE_START + names.IMAGE_TOKEN * (tokens_per_tile * next(counts)) + IMAGE_END + part
        opening = f"{TURN_START}{turn.role}\n"
        # Turns begin and end with added tokens, at which the tokenizer cuts: they can be encoded one by one.
        new = tokenizer.encode(opening + text + TURN_END, add_bos=i == 0)
        ids += new
        if turn.role != "assistant":
            answers += [False] * len(new)
            continue
        head = tokenizer.encode(opening, add_bos=False)
        shared = next((j for j, (a, b) in enumerate(zip(head, new, strict=False)) if a != b), len(head))
        answers += [False] * shared + [True] * (len(new) - shared)
    return np.array(ids, np.int32), np.array(answers, np.bool_)


def sample_from_conversation(
    conversation: Conversation,
    folder: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_tiles: int | None,
    system: str | None,
) -> Sample:
    """Read the images of a conversation and tokenise it.

    Args:
        conversation: a checked one.
        folder: where relative image paths begin.
        spec: the model.
        tokenizer: of the model.
        max_tokens: longest sample that is accepted.
        max_tiles: most tiles of all images together, without thumbnails; each image gets at least one.
        system: system text where the conversation has none.

    Raises:
        SampleError: an image is missing or damaged, or there are too many tokens.
    """
    images = conversation.images
    most = spec.vision.max_tiles if max_tiles is None else max_tiles
    each = max(spec.vision.min_tiles, most // max(1, len(images)), 1)
    tiles = []
    for image in images:
        path = folder / image
        if not path.is_file():
            raise SampleError("missing image", str(path))
        try:
            tiles.append(tiles_from_image(load_image(path), spec.vision, max_tiles=each))
        except MmmError as error:
            raise SampleError("damaged image", f"{path}: {error.what}") from error
    ids, answers = token_ids(
        conversation, tokenizer, [len(part) for part in tiles], spec.vision.tokens_per_tile, system
    )
    if len(ids) > max_tokens:
        raise SampleError("too many tokens", f"{len(ids)} tokens, {max_tokens} allowed")
    side = spec.vision.tile_size
    pixels = np.concatenate(tiles) if tiles else np.zeros((0, 3, side, side), np.float32)
    return Sample(ids, answers, pixels)
