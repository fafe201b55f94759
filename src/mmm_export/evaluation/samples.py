"""What is asked: the digits task, or the conversations of a JSONL file."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmm_export.errors import MmmError, OptionError
from mmm_export.images import ImageSource

DIGITS = "digits"
ASKED = "asked"  # kind of a sample whose line names none
ROLES = ("human", "gpt")  # of InternVL's conversations


class DataError(MmmError):
    """A data file cannot be used."""


@dataclass(frozen=True)
class Sample:
    """A question about images, and its true answer.

    Attributes:
        name: what to call it in a listing.
        kind: of question; accuracy is given for each.
        question: as a user asks it; `<image>` where an image belongs, or nowhere.
        answer: the true one.
        images: of the question, in order.
    """

    name: str
    kind: str
    question: str
    answer: str
    images: tuple[ImageSource, ...]


def read_samples(task: str, limit: int | None = None) -> list[Sample]:
    """Give the samples of a task: "digits", or the path of a JSONL file; at most `limit`.

    Raises:
        DataError: the file cannot be used.
        OptionError: the task is no such thing.
    """
    if task == DIGITS:
        return list(digits_samples(limit))
    path = Path(task)
    if not path.is_file():
        raise OptionError(
            "there is no such task",
            found=f"{task!r:.80}",
            wanted=f"{DIGITS}, or the path of a JSONL file with conversations",
        )
    return jsonl_samples(path, limit)


def digits_samples(limit: int | None = None) -> Iterator[Sample]:
    """Draw the test set of the digits task, or its first samples. Needs scikit-learn and scikit-image."""
    from mmm_export.distillation.digits.assets import packaged_assets
    from mmm_export.distillation.digits.samples import TEST_SAMPLES, samples

    assets = packaged_assets()
    for sample in samples("test", min(limit or TEST_SAMPLES, TEST_SAMPLES)):
        picture = Image.fromarray(sample.picture(assets))
        asked = sample.question
        yield Sample(f"test {sample.number}", asked.kind, asked.text, asked.answer, (picture,))


def jsonl_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """Read conversations in InternVL's form, one JSON object a line; of each the first question is asked.

    A line has `conversations`, a list of {"from": "human" or "gpt", "value": text}; `image`, a path or a list of paths beside
    the file; and perhaps `kind`.

    Raises:
        DataError: naming file and line: not JSON, no question with an answer, or an image that is not there.
    """
    found: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read", found=str(error), wanted="JSON objects in UTF-8, one a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(found) < limit):
            found.append(_from_line(path, number, line))
    if not found:
        raise DataError(f"{path} is empty", found="no line with a conversation", wanted="at least one")
    return found


def _from_line(path: Path, number: int, line: str) -> Sample:
    where = f"{path}, line {number}"

    def wrong(found: object, wanted: str) -> DataError:
        return DataError(f"{where} cannot be used", found=reprlib.repr(found), wanted=wanted)

    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON", found=str(error), wanted="one JSON object") from error
    if not isinstance(data, dict):
        raise wrong(data, "an object { ... }")
    turns = data.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise wrong(turns, 'conversations: a list of at least two {"from", "value"}')
    texts = [turn.get("value") for turn in turns[:2] if isinstance(turn.get("value"), str)]
    if tuple(turn.get("from") for turn in turns[:2]) != ROLES or len(texts) != 2 or not all(t.strip() for t in texts):
        raise wrong(turns[:2], "a question from human, then its answer from gpt")
    images = data.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and "\0" not in image for image in images):
        raise wrong(images, "image: a path or a list of paths")
    places = [path.parent / image for image in images]
    for place in places:
        if not place.is_file():
            raise DataError(f"{where} names an image that is not there", found=f"{place}", wanted="an image file")
    kind = data.get("kind", ASKED)
    if not isinstance(kind, str) or not kind:
        raise wrong(kind, "kind: a word")
    return Sample(f"line {number}", kind, texts[0], texts[1], tuple(places))
