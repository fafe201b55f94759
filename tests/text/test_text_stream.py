"""Streams of tokens: what they emit together, when they emit it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.errors import OptionError
from mmm_export.text import TextStream, Tokenizer
from mmm_export.text.stream import _Tidy
from mmm_export.text.tokenizer import tidy_spaces

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module", params=["plain", "prefix", "nobyte", "null", "separate"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: MakeFolder) -> Tokenizer:
    if request.param == "separate":  # tokens that are added but not special stand apart; spaces are tidied twice
        config = {"clean_up_tokenization_spaces": True}
        added = {"<one>": 640, "<two>": 641, " .": 642}
        files = {"tokenizer_config.json": config, "added_tokens.json": added}
        return Tokenizer.from_folder(tokenizer_folder("prefix", files))
    return Tokenizer.from_folder(tokenizer_folder(request.param))


def stream_all(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(index) for index in ids), stream.flush()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_together_equal_decoding_at_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    known = [index for index in range(tokenizer.vocab_size) if index in tokenizer._texts]
    of_bytes = [index for index in known if tokenizer.token_text(index).startswith("<0x")] or known
    with_role = sorted(tokenizer.special_ids | tokenizer.separate_ids)
    tidied = [
        i for i in known if tokenizer.token_text(i).strip("▁") in {"", ".", "?", "'", "n", "v", "r", "s", "t", "m"}
    ]
    pools = st.sampled_from([known, of_bytes, with_role, tidied])
    ids = data.draw(st.lists(pools.flatmap(st.sampled_from), max_size=25))
    assert "".join(stream_all(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_pieces_together_equal_the_reference(vector: dict[str, Any], tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder(vector["model"], vector["files"]))
    for ids, _, plain_text in vector["decode"]:
        assert "".join(stream_all(tokenizer, ids)) == plain_text


@pytest.mark.parametrize("text", ["🙂", "é", "𠀀𠀁", "中"])
def test_character_made_of_bytes_comes_whole_with_its_last_byte(tokenizer_folder: MakeFolder, text: str) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("plain"))
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = stream_all(tokenizer, ids)
    assert "".join(pieces) == text
    ends = {sum(len(c.encode()) for c in text[: i + 1]) - 1: c for i, c in enumerate(text)}
    assert pieces == [ends.get(i, "") for i in range(len(ids))] + [""]


def test_half_a_character_shows_as_replacement_only_at_the_end(tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("plain"))
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🙂".encode()[:3]]
    assert stream_all(tokenizer, ids) == ["", "", "", "\ufffd\ufffd\ufffd"]


def test_plain_words_come_at_once(tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("plain"))
    stream = TextStream(tokenizer)
    shown = ""
    for count, index in enumerate(ids := tokenizer.encode("图片中有一只猫。What is this?", add_bos=False), 1):
        shown += stream.push(index)
        behind = len(tokenizer.decode(ids[:count])) - len(shown)
        # Held back: spaces and the beginnings of contractions, here never more than one token's text.
        assert behind <= len(tokenizer.token_text(index))
    assert shown + stream.flush() == tokenizer.decode(ids)


def test_flushed_stream_is_as_new(tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("prefix"))
    ids = tokenizer.encode("Hello world", add_bos=False)
    stream = TextStream(tokenizer)
    first = [*map(stream.push, ids), stream.flush()]
    assert [*map(stream.push, ids), stream.flush()] == first


def test_cost_of_a_token_does_not_grow_with_the_answer(tokenizer_folder: MakeFolder) -> None:
    # Counted, not timed: a stream may keep no more than a few characters of what it has shown.
    tokenizer = Tokenizer.from_folder(tokenizer_folder("plain"))
    stream = TextStream(tokenizer)
    for index in tokenizer.encode("the picture of a cat " * 500, add_bos=False):
        stream.push(index)
        assert sum(map(len, stream._run_tidy._held)) <= 8  # "picture" and a space are the longest that can be held
        assert len(stream._run._bytes) <= 3


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text(alphabet=" 'nvresm.t?x", max_size=5), max_size=12))
def test_tidying_in_pieces_equals_tidying_at_once(pieces: list[str]) -> None:
    tidy = _Tidy()
    assert "".join(map(tidy.push, pieces)) + tidy.flush() == tidy_spaces("".join(pieces))


def test_last_run_without_text_is_still_joined_by_a_space(tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("prefix", {"added_tokens.json": {"<one>": 640}}))
    ids = [640, tokenizer.token_id("▁")]  # the space piece loses its only space at the start of a run
    assert "".join(stream_all(tokenizer, ids)) == tokenizer.decode(ids) == "<one> "
    assert "".join(stream_all(tokenizer, [*ids, 640])) == tokenizer.decode([*ids, 640]) == "<one> <one>"


def test_unknown_id_is_refused(tokenizer_folder: MakeFolder) -> None:
    stream = TextStream(Tokenizer.from_folder(tokenizer_folder("plain")))
    with pytest.raises(OptionError, match="9999"):
        stream.push(9999)
