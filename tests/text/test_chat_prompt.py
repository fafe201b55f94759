"""The chat template, written out, and where image marks go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.errors import OptionError, PromptError
from mmm_export.text import DEFAULT_SYSTEM, chat_prompt, turn_prompt

HEAD = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>"


def image(tokens: int) -> str:
    return "<img>" + "<IMG_CONTEXT>" * tokens + "</img>"


def test_question_alone_is_the_template_written_out() -> None:
    assert chat_prompt("Hi?") == HEAD + "<|im_start|>user\nHi?<|im_end|><|im_start|>assistant\n"
    assert "InternVL" in DEFAULT_SYSTEM


def test_history_is_put_between_system_and_question() -> None:
    prompt = chat_prompt("c", history=[("a", "b")], system="S")
    assert prompt == (
        "<|im_start|>system\nS<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>"
        "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n"
    )


def test_one_image_without_a_mark_goes_in_front() -> None:
    assert f"user\n{image(6)}\nWhat?<|im_end|>" in chat_prompt("What?", tile_counts=[3], tokens_per_tile=2)


def test_several_images_without_marks_get_numbered_lines() -> None:
    prompt = chat_prompt("Same?", tile_counts=[1, 2], tokens_per_tile=1)
    assert f"user\nImage-1: {image(1)}\nImage-2: {image(2)}\nSame?<|im_end|>" in prompt


def test_marks_are_filled_in_order_over_all_turns() -> None:
    history = [("old <image>", "yes")]
    prompt = chat_prompt("<image> and <image>?", tile_counts=[1, 2, 3], tokens_per_tile=1, history=history)
    assert f"old {image(1)}<|im_end|>" in prompt
    assert f"user\n{image(2)} and {image(3)}?<|im_end|>" in prompt


def test_image_of_an_earlier_turn_needs_no_new_mark() -> None:
    prompt = chat_prompt("And now?", tile_counts=[1], tokens_per_tile=1, history=[("<image>\nWhat?", "A cat.")])
    assert prompt.count("<img>") == 1
    assert "user\nAnd now?<|im_end|>" in prompt


def test_answer_that_names_the_mark_is_left_alone() -> None:
    assert "assistant\nuse <image><|im_end|>" in chat_prompt("b", history=[("a", "use <image>")])


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("<image>", {}),
        ("<image> <image>", {"tile_counts": [1]}),
        ("<image>", {"tile_counts": [1, 1]}),
        ("new", {"tile_counts": [1], "history": [("old", "answer")]}),
    ],
)
def test_marks_and_images_that_disagree_are_refused(question: str, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="disagree"):
        chat_prompt(question, **options)


@pytest.mark.parametrize("question", ["", "  \n\t", "\u3000"])
@pytest.mark.parametrize("tile_counts", [[], [1]])
def test_blank_question_is_refused_with_and_without_images(question: str, tile_counts: list[int]) -> None:
    for write in (chat_prompt, turn_prompt):
        with pytest.raises(PromptError, match="empty"):
            write(question, tile_counts=tile_counts)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("<IMG_CONTEXT>", {}),
        ("see <IMG_CONTEXT>", {"tile_counts": [1]}),
        ("ok", {"history": [("<IMG_CONTEXT>", "b")]}),
        ("ok", {"history": [("a", "<IMG_CONTEXT>")]}),
        ("ok", {"system": "<IMG_CONTEXT>"}),
    ],
)
def test_typed_image_token_is_refused(question: str, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="<IMG_CONTEXT>"):
        chat_prompt(question, **options)


@pytest.mark.parametrize("options", [{"tile_counts": [0]}, {"tile_counts": [1, -1]}, {"tokens_per_tile": 0}])
def test_counts_below_one_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        chat_prompt("What?", **options)


@settings(max_examples=50, deadline=None)
@given(
    tiles=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    tokens=st.integers(1, 5),
    words=st.lists(st.text(alphabet="abc \n", max_size=5), min_size=5, max_size=5),
)
def test_image_tokens_are_tiles_times_tokens(tiles: list[int], tokens: int, words: list[str]) -> None:
    question = "?" + "<image>".join(words[: len(tiles) + 1])
    prompt = chat_prompt(question, tile_counts=tiles, tokens_per_tile=tokens)
    assert prompt.count("<IMG_CONTEXT>") == sum(tiles) * tokens
    assert "<image>" not in prompt


def test_next_turn_continues_the_whole_conversation() -> None:
    first = chat_prompt("a", tile_counts=[1], tokens_per_tile=2)
    whole = chat_prompt("c<image>", tile_counts=[1, 2], tokens_per_tile=2, history=[("<image>\na", "b")])
    assert first + "b<|im_end|>" + turn_prompt("c<image>", tile_counts=[2], tokens_per_tile=2) == whole
