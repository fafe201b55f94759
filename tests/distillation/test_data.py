"""Conversations on their way into batches: what is trained, what is left out, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmm_export.distillation.conversation import (
    Conversation,
    DataError,
    Sample,
    SampleError,
    Turn,
    read_line,
    token_ids,
)
from mmm_export.distillation.jsonl_data import JsonlData
from mmm_export.distillation.packing import batch_from_samples, rows_of
from mmm_export.distillation.recipe import DataOptions
from mmm_export.model.testing import tiny_spec
from mmm_export.model.testing.vocabulary import write_tokenizer
from mmm_export.text import Tokenizer
from mmm_export.text.prompt import chat_prompt

SPEC = tiny_spec(kinds="teacher", max_tiles=2)
OPTIONS = DataOptions(max_tokens=200, max_tiles=2, workers=0, system="")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, SPEC.vocab_size)
    return Tokenizer.from_folder(folder)


def line(question="<image>\nWhat is it?", answer="A cat.", image="a.png", **more):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": messages, **({"image": image} if image else {}), **more}


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")

    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


def open_data(path, tokenizer, options=OPTIONS, **more):
    return JsonlData(path, SPEC, tokenizer, options, **more)


def test_the_prompt_that_is_trained_is_the_prompt_that_is_asked(tokenizer):
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."), Turn("user", "Sure?"))
    whole = (*turns, Turn("assistant", "Yes."))
    ids, answers = token_ids(Conversation(whole, ("a",)), tokenizer, [2], 4, "Be kind.")
    asked = tokenizer.encode(
        chat_prompt(
            "Sure?",
            tile_counts=[2],
            tokens_per_tile=4,
            history=[("<image>\nWhat is it?", "A cat.")],
            system="Be kind.",
        )
    )
    assert ids[: len(asked)].tolist() == asked
    assert not answers[len(asked) - 1]
    assert answers[len(asked) :].all()
    said = tokenizer.decode(ids[answers].tolist())
    assert "cat" in said
    assert "Yes." in said
    assert "What" not in said
    assert ids[-1] == tokenizer.token_id("<|im_end|>")


BAD = {
    "no JSON": "{oops\n",
    "no JSON object": "[1]\n",
    "no conversation": {"image": "a.png"},
    "unknown message": {"conversations": [{"from": "cat", "value": "miaow"}]},
    "turns out of order": {"conversations": [{"from": "gpt", "value": "hello"}]},
    "empty message": line(answer=" "),
    "image is no path": line(image=[3]),
    "no image mark": line(question="What is it?"),
    "image marks and images disagree": line(question="<image><image>"),
    "image mark outside a question": line(question="What is it?", answer="<image>"),
    "image token in a text": line(question="<image> <IMG_CONTEXT>"),
    "missing image": line(image="b.png"),
    "damaged image": line(image="broken.png"),
    "too many tokens": line(question="<image>" + "why " * 300),
    "text is not valid Unicode": '{"conversations": [{"from": "human", "value": "\\ud800"}]}\n',
}


@pytest.mark.parametrize("reason", BAD)
def test_an_unusable_sample_is_left_out_and_counted(file, tokenizer, reason):
    data = open_data(file(line(), BAD[reason], line()), tokenizer)
    (batch,) = data.batches([[0, 1, 2]])
    assert batch.samples == 2
    assert data.summary() == {reason: 1}
    assert data.skipped == {2: reason}


@pytest.mark.parametrize("reason", BAD)
def test_strict_refuses_it_and_names_the_line(file, tokenizer, reason):
    with pytest.raises(DataError, match=f"line 2 of .*: {reason}"):
        list(open_data(file(line(), BAD[reason]), tokenizer, strict=True).batches([[0, 1]]))


@pytest.mark.parametrize("lines", [(), ("\n\n",), ("{oops\n",), (BAD["missing image"],) * 3])
def test_data_without_any_usable_sample_is_refused(file, tokenizer, lines):
    with pytest.raises(DataError, match="no usable sample"):
        open_data(file(*lines), tokenizer)


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="cannot be read"):
        open_data(tmp_path / "none.jsonl", tokenizer)


def test_a_pass_whose_samples_are_all_unusable_trains_nothing(file, tokenizer):
    data = open_data(file(line(), "{oops\n"), tokenizer)
    (batch,) = data.batches([[1]])
    assert batch.samples == 0
    assert not batch.valid.any()
    assert (batch.targets < 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_neither_order_nor_content(file, tokenizer, workers):
    lines = [line(question=f"<image> number {i}?", answer=f"{i}") for i in range(9)] + ["{oops\n"]
    data = open_data(file(*lines), tokenizer, replace(OPTIONS, workers=workers))
    found = list(data.batches([[8, 1], [9, 0], [4]]))
    wanted = list(open_data(file(*lines), tokenizer).batches([[8, 1], [9, 0], [4]]))
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))
    assert data.skipped == {10: "no JSON"}


def test_several_images_share_the_tiles_of_a_sample(file, tokenizer, tmp_path):
    Image.new("RGB", (112, 56)).save(tmp_path / "wide.png")
    alone, two = line(image="wide.png"), line(question="<image> or <image>?", image=["wide.png", "wide.png"])
    data = open_data(file(alone, two), tokenizer)
    assert data.sample(0).pixels.shape[0] == 3  # two tiles and a thumbnail
    assert data.sample(1).pixels.shape[0] == 2
    image_tokens = [(data.sample(i).ids == SPEC.image_token_id).sum() for i in range(2)]
    assert image_tokens == [3 * SPEC.vision.tokens_per_tile, 2 * SPEC.vision.tokens_per_tile]


REASONS = set(BAD)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["conversations", "image", "from", "value", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_line_is_a_conversation_or_a_sample_error(raw):
    found: object
    try:
        found = read_line(raw).turns[-1].role
    except SampleError as error:
        found = error.reason
    assert found == "assistant" or found in REASONS


def sample_of(length, number):
    ids = np.arange(length, dtype=np.int32) + 100 * number
    return Sample(ids, ids % 2 == 0, np.full((1, 3, 56, 56), number, np.float32))


@given(st.lists(st.integers(1, 60), max_size=12))
def test_rows_hold_every_sample_once_and_are_never_too_long(lengths):
    rows = rows_of(lengths, 60)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 60 for row in rows)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=6), packing=st.booleans())
def test_packing_keeps_tokens_targets_positions_and_images_together(lengths, packing):
    samples = [sample_of(length, i + 1) for i, length in enumerate(lengths)]
    batch = batch_from_samples(samples, SPEC, max_tokens=100, packing=packing, dtype=torch.float32)
    order = []
    for row in range(batch.ids.shape[0]):
        starts = [int(t) for t in torch.nonzero(batch.valid[row] & (batch.positions[row] == 0)).flatten()]
        for start in starts:
            number = int(batch.ids[row, start]) // 100
            sample = samples[number - 1]
            part = slice(start, start + len(sample.ids))
            assert batch.ids[row, part].tolist() == sample.ids.tolist()
            assert batch.positions[row, part].tolist() == list(range(len(sample.ids)))
            wanted = [int(t) if a else -100 for t, a in zip(sample.ids[1:], sample.answers[1:], strict=True)] + [-100]
            assert batch.targets[row, part].tolist() == wanted
            order.append(number)
    assert sorted(order) == list(range(1, len(lengths) + 1))
    assert batch.pixels[:, 0, 0, 0].tolist() == order
    assert int(batch.valid.sum()) == sum(lengths)
