"""The tokenizer against frozen results of the reference (vectors/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.errors import OptionError, PromptError
from mmm_export.text import Tokenizer, TokenizerError

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def released(tokenizer_folder: MakeFolder) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder("plain"))


def test_added_and_special_tokens_are_the_references(vector: dict[str, Any], tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder(vector["model"], vector["files"]))
    assert tokenizer.added.ids == vector["ids"]
    assert sorted(tokenizer.special_ids) == vector["special"]


def test_encoding_equals_the_reference(vector: dict[str, Any], tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder(vector["model"], vector["files"]))
    for text, ids, plain_ids in vector["encode"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_bos=False) == plain_ids, text


def test_decoding_equals_the_reference(vector: dict[str, Any], tokenizer_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder(vector["model"], vector["files"]))
    for ids, text, plain_text in vector["decode"]:
        assert tokenizer.decode(ids) == text, ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == plain_text, ids


def test_null_character_becomes_its_own_piece_where_the_vocabulary_has_one(tokenizer_folder: MakeFolder) -> None:
    with_piece = Tokenizer.from_folder(tokenizer_folder("null"))
    without = Tokenizer.from_folder(tokenizer_folder("plain"))
    assert with_piece.encode("a\0", add_bos=False)[-1] == with_piece.find("\0")
    assert without.encode("a\0", add_bos=False)[-1] == without.find("<0x00>")
    assert with_piece.decode(with_piece.encode("a\0b", add_bos=False)) == "a\0b"


def test_special_tokens_typed_by_a_user_act_as_special_tokens(released: Tokenizer) -> None:
    assert released.token_id("<|im_end|>") in released.encode("bye<|im_end|>")


def test_base_and_added_tokens_have_the_released_order(released: Tokenizer) -> None:
    order = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    first = released.token_id(order[0])
    assert [released.token_id(token) - first for token in order] == list(range(6))
    assert released.vocab_size == 640 + 9
    assert (released.bos_id, released.eos_id) == (1, 2)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_without_spaces_to_tidy_survives_the_round_trip(released: Tokenizer, text: str) -> None:
    # The reference tidies spaces when it decodes, and added tokens get spaces around them; all other text must come back.
    text = text.replace(" ", "_")
    if any(token in text for token in released.added.ids):
        return
    assert released.decode(released.encode(text, add_bos=False)) == text


def test_longest_added_token_wins_at_the_leftmost_place(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder("plain", {"added_tokens.json": {"<a": 640, "<ab>": 641, "b>c": 642}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<ab>c<a", add_bos=False) == [641, *tokenizer.encode("c", add_bos=False), 640]


def test_numpy_ids_decode_like_plain_ones(released: Tokenizer) -> None:
    ids = released.encode("Hello world<|im_end|>")
    assert released.decode(np.array(ids, np.int64)) == released.decode(ids)


@pytest.mark.parametrize("token_id", [-1, 649, 10**9])
def test_id_outside_the_vocabulary_is_refused(released: Tokenizer, token_id: int) -> None:
    with pytest.raises(OptionError, match=str(token_id)) as caught:
        released.decode([5, token_id])
    assert caught.value.wanted == "0 to 648"


def test_unknown_token_text_is_refused_or_not_found(released: Tokenizer) -> None:
    assert released.find("<nothing>") is None
    with pytest.raises(TokenizerError, match="<nothing>"):
        released.token_id("<nothing>")


def test_text_that_is_not_unicode_is_a_prompt_error(released: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode") as caught:
        released.encode("half a pair \ud83d")
    assert "character 12" in str(caught.value.found)
