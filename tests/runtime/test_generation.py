"""Answers: when they end, what text comes when, what is in the context afterwards. A toy model writes from a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy import ToyBackend, toy_session

from mmm_export.errors import MmmError, PromptError
from mmm_export.runtime import GenerationOptions, Session
from mmm_export.text import Tokenizer, chat_prompt

Open = Callable[..., tuple[Session, ToyBackend]]


@pytest.fixture
def writing(folder: Path) -> Open:
    """Open a session whose model answers every prompt with the given tokens, then with token 300 for ever."""

    def open_session(answer: list[int], kinds: str = "linear", **options: Any) -> tuple[Session, ToyBackend]:
        starts: list[int] = []

        def script(tokens: int) -> int:
            if not starts or backend.calls[-1] > 1:  # a prompt has just been read
                starts.append(tokens)
            index = tokens - starts[-1]
            return answer[index] if index < len(answer) else 300

        session, backend = toy_session(kinds, folder=folder, script=script, chunk_tokens=1000, **options)
        return session, backend

    return open_session


def asked(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(chat_prompt(question))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_bos=False)


def test_answer_streams_until_the_stop_token_and_leaves_it_out(writing: Open, tokenizer: Tokenizer) -> None:
    ids = plain(tokenizer, "The cat sat on the mat.")
    end = tokenizer.token_id("<|im_end|>")
    session, backend = writing([*ids, end])
    answer = session.generate("Where?")
    pieces = list(answer)
    assert "".join(pieces) == answer.text == "The cat sat on the mat."
    assert len(pieces) > 3
    assert all(pieces)
    assert answer.finish_reason == "stop_token"
    assert answer.token_ids == tuple(ids)
    assert session.tokens == len(asked(tokenizer, "Where?")) + len(ids) + 1  # the stop token is in the context
    assert backend.tokens == session.tokens - 1  # but the model has not had to read it yet


def test_end_of_text_stops_too(writing: Open, tokenizer: Tokenizer) -> None:
    session, _ = writing([tokenizer.eos_id])
    answer = session.generate("Hi")
    assert list(answer) == []
    assert answer.finish_reason == "stop_token"


def test_nothing_happens_before_the_first_piece_is_asked_for(writing: Open) -> None:
    session, backend = writing([300])
    session.generate("Hi")
    assert session.tokens == 0
    assert backend.calls == []


def test_own_stop_ids_replace_the_default(writing: Open, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    session, _ = writing([300, end, 301, 302])
    answer = session.generate("Hi", options=GenerationOptions(stop_ids=(302,)))
    list(answer)
    assert answer.token_ids == (300, end, 301)
    assert answer.finish_reason == "stop_token"


def test_length_limit_counts_sampled_tokens(writing: Open) -> None:
    session, _ = writing([])
    answer = session.generate("Hi", options=GenerationOptions(max_new_tokens=5))
    list(answer)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == answer.statistics.new_tokens == 5


def test_stop_string_across_tokens_is_never_shown(writing: Open, tokenizer: Tokenizer) -> None:
    ids = plain(tokenizer, "The cat sat on the mat.")
    session, _ = writing(ids)
    answer = session.generate("Hi", options=GenerationOptions(stop=("t on t", "never")))
    pieces = list(answer)
    assert "".join(pieces) == answer.text == "The cat sa"
    assert answer.finish_reason == "stop_string"
    assert session.tokens == len(asked(tokenizer, "Hi")) + len(answer.token_ids)


def test_text_held_back_for_a_stop_string_comes_at_the_end(writing: Open, tokenizer: Tokenizer) -> None:
    ids = plain(tokenizer, "The cat sat")
    session, _ = writing(ids)
    options = GenerationOptions(stop=("sat on",), max_new_tokens=len(ids))
    assert "".join(session.generate("Hi", options=options)) == "The cat sat"


def test_pieces_never_split_a_character(writing: Open, tokenizer: Tokenizer) -> None:
    text = "é😀ß"
    ids = plain(tokenizer, text)
    assert len(ids) > len(text)  # byte pieces
    session, _ = writing([*ids, tokenizer.token_id("<|im_end|>")])
    pieces = list(session.generate("Hi"))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_token_without_text_is_kept_and_shown_as_nothing(folder: Path) -> None:
    # A vocabulary padded beyond the tokenizer: row 600 of the output has no token.
    session, _ = toy_session(folder=folder, vocab_size=640, image_token_id=506, script=lambda tokens: 600)
    answer = session.generate("Hi", options=GenerationOptions(max_new_tokens=2))
    assert list(answer) == []
    assert answer.token_ids == (600, 600)


def test_image_token_is_never_sampled(writing: Open, tokenizer: Tokenizer) -> None:
    session, _ = writing([tokenizer.token_id("<IMG_CONTEXT>")] * 3)
    answer = session.generate("Hi", options=GenerationOptions(max_new_tokens=3))
    list(answer)
    assert answer.token_ids == (0, 0, 0)  # all other logits are equal


def test_full_kv_cache_ends_the_answer(writing: Open, tokenizer: Tokenizer) -> None:
    count = len(asked(tokenizer, "Hi"))
    session, backend = writing([], "hybrid", max_tokens=count + 3)
    answer = session.generate("Hi")
    list(answer)
    # Three sampled tokens fit; the logits of the last give a fourth, which has no place any more.
    assert answer.finish_reason == "context_full"
    assert len(answer.token_ids) == 4
    assert session.tokens == backend.tokens == count + 3
    with pytest.raises(PromptError, match="KV cache"):
        session.generate("More")


def test_prompt_past_the_capacity_is_refused_at_once(writing: Open) -> None:
    session, backend = writing([], "hybrid", max_tokens=20)
    with pytest.raises(PromptError, match="KV cache"):
        session.generate("Hi " * 50)
    assert backend.calls == []


def conversation_ids(session: Session, backend: ToyBackend) -> list[int]:
    """Record every token that the model reads."""
    read: list[int] = []
    advance = backend.advance

    def recorded(input_ids: Any, features: Any) -> Any:
        read.extend(int(token) for token in input_ids)
        return advance(input_ids, features)

    backend.advance = recorded  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("ending", ["stop_token", "length", "stop_string"])
def test_second_turn_reads_the_tokens_of_the_whole_conversation(
    writing: Open, tokenizer: Tokenizer, ending: str
) -> None:
    ids = plain(tokenizer, "The cat sat")
    end = tokenizer.token_id("<|im_end|>")
    session, backend = writing([*ids, end])
    read = conversation_ids(session, backend)
    options = {
        "stop_token": GenerationOptions(),
        "length": GenerationOptions(max_new_tokens=len(ids)),
        "stop_string": GenerationOptions(stop=("sat",)),
    }[ending]
    first = session.generate("Where?", options=options)
    list(first)
    assert first.finish_reason == ending
    second = session.generate("And then?", options=GenerationOptions(max_new_tokens=1))
    list(second)
    # Everything at once; the first answer as it was sampled, since its text may be cut into tokens in another way.
    whole = chat_prompt("And then?", history=[("Where?", "ANSWER")])
    before, after = whole.split("ANSWER")
    wanted = tokenizer.encode(before) + list(first.token_ids) + plain(tokenizer, after)
    assert read == wanted
    assert read.count(tokenizer.bos_id) == 1
    assert second.statistics.prompt_tokens == len(wanted) - len(asked(tokenizer, "Where?")) - len(first.token_ids) - (
        ending == "stop_token"  # then it is a sampled token and not one of the second prompt
    )


def test_raw_context_is_continued_as_a_conversation(writing: Open, tokenizer: Tokenizer) -> None:
    session, backend = writing([])
    read = conversation_ids(session, backend)
    session.prefill(plain(tokenizer, "Some text."))
    list(session.generate("Hi", options=GenerationOptions(max_new_tokens=1)))
    turn = "<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert read == plain(tokenizer, "Some text.") + plain(tokenizer, turn)


def test_prefill_after_an_answer_reads_its_last_token_first(writing: Open, tokenizer: Tokenizer) -> None:
    session, backend = writing([301, 302])
    read = conversation_ids(session, backend)
    list(session.generate("Hi", options=GenerationOptions(max_new_tokens=2)))
    session.step(7)
    assert read[-3:] == [301, 302, 7]
    assert session.tokens == backend.tokens


def test_saved_conversation_goes_on_like_the_original(folder: Path, tmp_path: Path) -> None:
    options = GenerationOptions(max_new_tokens=6, temperature=1.0, seed=1, repetition_penalty=1.3, stop_ids=())
    original, _ = toy_session("hybrid", folder=folder, max_tokens=400)
    list(original.generate("Where is the cat?", options=options))
    original.save_state(tmp_path / "talk")
    copy, _ = toy_session("hybrid", folder=folder, max_tokens=400)
    copy.load_state(tmp_path / "talk")
    assert copy.tokens == original.tokens
    answers = [session.generate("And now?", options=options) for session in (original, copy)]
    assert list(answers[0]) == list(answers[1])
    assert answers[0].token_ids == answers[1].token_ids


def test_greedy_answer_is_prefill_then_steps(folder: Path) -> None:
    session, _ = toy_session("hybrid", folder=folder, max_tokens=400)
    answer = session.generate("Where?", options=GenerationOptions(max_new_tokens=8, stop_ids=()))
    list(answer)
    by_hand, _ = toy_session("hybrid", folder=folder, max_tokens=400)
    logits = by_hand.prefill(by_hand.encode("Where?")[0])
    tokens = []
    for _ in range(8):
        logits[by_hand.manifest.model.image_token_id] = -np.inf
        tokens.append(int(np.argmax(logits)))
        logits = by_hand.step(tokens[-1])
    assert answer.token_ids == tuple(tokens)
    assert len(set(tokens)) > 1


def test_repetition_penalty_counts_prompt_and_answer(folder: Path) -> None:
    options = GenerationOptions(max_new_tokens=12, stop_ids=(), repetition_penalty=1e6)
    session, _ = toy_session(folder=folder)
    answer = session.generate("Where?", options=options)
    list(answer)
    # So strong a penalty leaves no positive logit of a token that has occurred.
    assert len(set(answer.token_ids)) == 12
    assert not set(answer.token_ids) & set(session.encode("Where?")[0].tolist())


def test_same_seed_same_answer(folder: Path) -> None:
    def answer(seed: int) -> tuple[int, ...]:
        session, _ = toy_session(folder=folder)
        result = session.generate("Hi", options=GenerationOptions(temperature=2.0, seed=seed, max_new_tokens=10))
        list(result)
        return result.token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize("when", ["before_call", "after_call"])
@pytest.mark.parametrize("call", [0, 2])
def test_interrupted_answer_leaves_a_usable_conversation(
    writing: Open, tokenizer: Tokenizer, when: str, call: int
) -> None:
    session, backend = writing([])
    read = conversation_ids(session, backend)

    def interrupt(number: int) -> None:
        if number == call:
            raise KeyboardInterrupt

    setattr(backend, when, interrupt)
    answer = session.generate("Hi")
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert answer.finish_reason == "cancelled"
    assert list(answer) == []
    setattr(backend, when, lambda number: None)
    read[:] = read[: backend.tokens]  # what the model has really kept
    tokens_before = session.tokens
    second = session.generate("And then?", options=GenerationOptions(max_new_tokens=2))
    list(second)
    assert second.finish_reason == "length"
    if call == 2:
        # Each sampled token is read once: 300 twice, then the end of the turn.
        start = len(asked(tokenizer, "Hi"))
        assert read[start : start + 3] == [300, 300, tokenizer.token_id("<|im_end|>")]
        assert tokens_before == start + 2


def test_cancelled_answer_ends_where_it_is(writing: Open) -> None:
    session, _ = writing([])
    answer = session.generate("Hi")
    next(answer)
    answer.cancel()
    assert list(answer) == []
    assert answer.finish_reason == "cancelled"


@pytest.mark.parametrize("use", ["prefill", "reset", "generate", "load_state"])
def test_other_use_of_the_session_ends_an_open_answer(writing: Open, use: str, tmp_path: Path) -> None:
    session, _ = writing([])
    session.save_state(tmp_path / "state")
    answer = session.generate("Hi")
    next(answer)
    {
        "prefill": lambda: session.prefill([5]),
        "reset": session.reset,
        "generate": lambda: session.generate("More"),
        "load_state": lambda: session.load_state(tmp_path / "state"),
    }[use]()
    assert list(answer) == []
    assert answer.finish_reason == "cancelled"


def test_unusable_logits_end_the_answer_with_an_error(folder: Path) -> None:
    session, backend = toy_session(folder=folder)
    backend.head[:] = np.nan
    with pytest.raises(MmmError, match="not usable"):
        list(session.generate("Hi"))
    backend.head[:] = 1.0
    session.reset()
    list(session.generate("Hi", options=GenerationOptions(max_new_tokens=2)))


def test_statistics_count_tokens_and_time(writing: Open, tokenizer: Tokenizer) -> None:
    session, _ = writing([])
    picture = Image.new("RGB", (56, 56))
    answer = session.generate("Hi", [picture], GenerationOptions(max_new_tokens=4))
    assert answer.statistics.first_token_s is None
    assert answer.statistics.decode_tokens_per_s is None
    list(answer)
    found = answer.statistics
    assert found.image_tokens == session.manifest.model.vision.tokens_per_tile
    assert found.prompt_tokens == len(session.encode("Hi", [picture])[0])
    assert found.context_tokens == session.tokens == found.prompt_tokens + 4
    assert found.new_tokens == 4
    assert found.first_token_s is not None
    assert found.first_token_s > 0
    assert found.decode_tokens_per_s == pytest.approx(3 / found.decode_s)


def test_time_of_the_caller_is_not_decode_time(writing: Open) -> None:
    import time

    session, _ = writing([])
    answer = session.generate("Hi", options=GenerationOptions(max_new_tokens=3))
    for _ in answer:
        time.sleep(0.2)
    assert answer.statistics.decode_s < 0.2  # the toy needs a millisecond a token
