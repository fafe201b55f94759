"""The data file: what is read, and what is told of lines that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmm_export.errors import PromptFileError
from mmm_export.prompt_file import Prompt, read_prompts


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_both_layouts_give_question_images_and_answer(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "and now?"},
    ]
    path = written(
        tmp_path,
        {"prompt": "q", "images": ["a.png", "b.png"], "answer": "yes"},
        "",
        {"id": 7, "image": "c.png", "conversations": turns},
        {"prompt": "no picture"},
    )
    assert read_prompts(path, 10) == (
        Prompt(1, "q", ("a.png", "b.png"), "yes"),
        Prompt(3, "<image>\nwhat?", ("c.png",), "a cat"),
        Prompt(4, "no picture", (), None),
    )


def test_no_more_lines_are_read_than_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "one"}, {"prompt": "two"}, "this line is broken")
    assert [prompt.question for prompt in read_prompts(path, 2)] == ["one", "two"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        {},
        {"prompt": " "},
        {"prompt": 3},
        {"prompt": "q", "images": [1]},
        {"prompt": "q", "images": {"a": 1}},
        {"prompt": "q", "answer": ["x"]},
        {"prompt": "q", "image": "a\0b"},
        {"conversations": []},
        {"conversations": "x"},
        {"conversations": [{"from": "gpt", "value": "x"}]},
        {"conversations": [{"from": "human"}]},
        '{"prompt": "\\ud800"}',
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path: Path, line: object) -> None:
    with pytest.raises(PromptFileError, match=r"line 2 of .* is broken") as caught:
        read_prompts(written(tmp_path, {"prompt": "fine"}, line), 10)
    assert caught.value.found
    assert caught.value.wanted


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="has no prompts"):
        read_prompts(written(tmp_path, "", "  "), 10)
    with pytest.raises(PromptFileError, match="cannot be read"):
        read_prompts(tmp_path / "nothing.jsonl", 10)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "images", "image", "answer", "conversations", "from", "value"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | _JSON.map(lambda data: json.dumps(data).encode()))
def test_whatever_a_file_holds_it_gives_prompts_or_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path, 10)
    except PromptFileError:
        return
    assert all(prompt.question.strip() for prompt in prompts)
