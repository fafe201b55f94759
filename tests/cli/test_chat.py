"""A conversation's own memory: which images wait for the next question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mmm_export.chat import Conversation
from mmm_export.errors import PromptError
from mmm_export.runtime import Generation, GenerationOptions, GenerationStatistics, Session


class Answer(list[str]):
    statistics = GenerationStatistics(1, 0, 1, 1, 0.1, 0.0)
    finish_reason = "length"


def test_images_of_a_refused_question_wait_for_the_next_one() -> None:
    asked: list[list[Path]] = []

    def generate(prompt: str, images: Sequence[Path], *_: Any, **__: Any) -> Generation:
        if not prompt:
            raise PromptError("the prompt is empty")
        asked.append(list(images))
        return cast(Generation, Answer(["x"]))

    session = cast(Session, SimpleNamespace(generate=generate))
    talk = Conversation(session, GenerationOptions(), images=[Path("a.png")])
    with pytest.raises(PromptError):
        talk.ask("")
    talk.ask("What?")
    talk.ask("And?")
    assert asked == [[Path("a.png")], []]
