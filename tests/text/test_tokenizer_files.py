"""Damaged, missing and contradictory tokenizer files: one TokenizerError that names the file, never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.text import TextStream, Tokenizer, TokenizerError
from mmm_export.text.piece_model import piece_model_from_bytes

MakeFolder = Callable[..., Path]
FILES = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")


def test_folder_without_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.found == "no tokenizer.model in it"
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path / "nowhere")
    assert caught.value.found == "no such folder"


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff" * 50])
def test_file_that_is_no_vocabulary_is_refused(tokenizer_folder: MakeFolder, content: bytes) -> None:
    folder = tokenizer_folder("plain")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is damaged"):
        Tokenizer.from_folder(folder)


def test_vocabulary_cut_inside_a_piece_is_refused(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder("plain")
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:5001])
    with pytest.raises(TokenizerError, match="damaged") as caught:
        Tokenizer.from_folder(folder)
    assert "ends inside" in str(caught.value.found)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_vocabulary_loads_or_is_refused(tokenizer_folder: MakeFolder, data: st.DataObject) -> None:
    folder = _scratch(tokenizer_folder)
    path = folder / "tokenizer.model"
    content = bytearray(_pristine(tokenizer_folder))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=8)):
        if content:
            content[position % len(content)] ^= value
    path.write_bytes(bytes(content))
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TokenizerError:
        return
    ids = tokenizer.encode("Hello, 图片 🙂 <|im_end|>")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_random_bytes_are_no_vocabulary(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):  # a real one needs far more than 60 bytes to be anything else
        piece_model_from_bytes(content + b"\x07")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": ', "\ufeff{}", '{"a": NaN,}', "[" * 100_000])
def test_malformed_json_is_refused_by_name(tokenizer_folder: MakeFolder, name: str, content: str) -> None:
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_folder(tokenizer_folder("plain", {name: content}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 700) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "added_tokens_decoder",
        "additional_special_tokens",
        "bos_token",
        "unk_token",
        "add_bos_token",
        "content",
        "5",
        "<a>",
    ]
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), content=st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=2)))
def test_json_of_any_shape_loads_or_is_refused(tokenizer_folder: MakeFolder, name: str, content: Any) -> None:
    folder = _scratch(tokenizer_folder)
    (folder / "tokenizer.model").write_bytes(_pristine(tokenizer_folder))
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    error = None
    try:
        assert Tokenizer.from_folder(folder).decode([300, 301])
    except TokenizerError as caught:
        error = caught
    finally:
        (folder / name).unlink()
    assert error is None or name in error.what


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"added_tokens.json": {"<a>": 640, "<b>": 640}}, "id 640 for '<b>' and for '<a>'"),
        (
            {
                "added_tokens.json": {"<a>": 640},
                "tokenizer_config.json": {"added_tokens_decoder": {"640": {"content": "<b>"}}},
            },
            "id 640 for '<b>' and for '<a>'",
        ),
    ],
)
def test_two_tokens_with_one_id_are_refused(tokenizer_folder: MakeFolder, files: dict[str, Any], found: str) -> None:
    with pytest.raises(TokenizerError, match="one id to two tokens") as caught:
        Tokenizer.from_folder(tokenizer_folder("plain", files))
    assert caught.value.found == found


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"640": {"content": "<a>"}, "641": {"content": "<a>"}}}},
        {"added_tokens.json": {"<s>": 640}},
    ],
)
def test_one_token_with_two_ids_is_refused(tokenizer_folder: MakeFolder, files: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="two ids to one token"):
        Tokenizer.from_folder(tokenizer_folder("plain", files))


@pytest.mark.parametrize("value", [-1, 1.5, "7", True, None])
def test_added_token_without_a_proper_id_is_refused(tokenizer_folder: MakeFolder, value: Any) -> None:
    with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
        Tokenizer.from_folder(tokenizer_folder("plain", {"added_tokens.json": {"<a>": value}}))


_made: dict[str, Any] = {}


def _scratch(make: MakeFolder) -> Path:
    """One folder for all examples of a property; every example writes what it needs."""
    if "folder" not in _made:
        _made["folder"] = make("plain", {})
    folder: Path = _made["folder"]
    return folder


def _pristine(make: MakeFolder) -> bytes:
    if "content" not in _made:
        _made["content"] = (make("plain", {}) / "tokenizer.model").read_bytes()
    content: bytes = _made["content"]
    return content
