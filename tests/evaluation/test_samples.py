"""Reading samples from a JSONL file: good lines, and every way in which one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmm_export.errors import MmmError, OptionError
from mmm_export.evaluation.samples import DataError, Sample, jsonl_samples, read_samples

TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "this"}]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_lines_become_samples_with_their_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write(
        tmp_path,
        {"conversations": TURNS, "image": "a.png", "kind": "which"},
        "",
        {"conversations": [*TURNS, *TURNS], "image": ["a.png", "a.png"]},
        {"conversations": TURNS},
    )
    question = "<image>\nWhich?"
    assert jsonl_samples(path) == [
        Sample("line 1", "which", question, "this", (tmp_path / "a.png",)),
        Sample("line 3", "asked", question, "this", (tmp_path / "a.png", tmp_path / "a.png")),
        Sample("line 4", "asked", question, "this", ()),
    ]
    assert len(jsonl_samples(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ([1], "an object"),
        ({}, "conversations"),
        ({"conversations": TURNS[:1]}, "at least two"),
        ({"conversations": TURNS[::-1]}, "a question from human"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "its answer from gpt"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": 3}]}, "its answer from gpt"),
        ({"conversations": TURNS, "image": 3}, "a path or a list of paths"),
        ({"conversations": TURNS, "image": "gone.png"}, "names an image that is not there"),
        ({"conversations": TURNS, "kind": 3}, "kind: a word"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path, {"conversations": TURNS}, line)
    with pytest.raises(DataError) as error:
        jsonl_samples(path)
    assert f"{path}, line 2" in str(error.value)
    assert said in str(error.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        jsonl_samples(write(tmp_path, "", ""))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        jsonl_samples(tmp_path / "data.jsonl")


def test_a_task_that_is_neither_known_nor_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such task"):
        read_samples(str(tmp_path / "digit"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["conversations", "image", "from", "value", "kind"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=json_values.map(json.dumps) | st.text(max_size=40))
def test_any_line_gives_samples_or_a_clear_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line, encoding="utf-8", errors="replace")
    try:
        found = jsonl_samples(path)
    except MmmError:
        return
    assert all(sample.question and sample.answer for sample in found)
