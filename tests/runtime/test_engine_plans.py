"""The arithmetic around an engine: buffers, profiles, and which tensor is what. No GPU, no library."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_manifest

from mmm_export import names
from mmm_export.engine_manifest import EmbeddingTable, PlanInfo, ProfileInfo, ShapeRange
from mmm_export.errors import EngineError
from mmm_export.manifest import TensorInfo
from mmm_export.runtime.state_layout import state_layout
from mmm_export.runtime.tensorrt.binding_table import buffer_sizes, decoder_bindings, second, vision_output_dtype
from mmm_export.runtime.tensorrt.buffer_plan import ALIGNMENT, plan_buffers
from mmm_export.runtime.tensorrt.embedding_rows import EmbeddingRows
from mmm_export.runtime.tensorrt.profiles import decoder_profiles, vision_profile

PREFILL = ShapeRange((1, 2, 64), (1, 8, 64), (2, 16, 64))
DECODE = ShapeRange((1, 1, 64), (1, 1, 64), (2, 1, 64))


@given(
    st.dictionaries(st.text(max_size=4), st.integers(0, 5000), max_size=20),
    st.integers(1, 8000),
)
def test_buffers_are_aligned_disjoint_and_inside_their_arenas(sizes: dict[str, int], arena_bytes: int) -> None:
    plan = plan_buffers(sizes, arena_bytes=arena_bytes)
    assert set(plan.places) == set(sizes)
    assert plan.total_bytes == sum(plan.arenas)
    spans = sorted((p.arena, p.offset, p.offset + max(p.bytes, 1)) for p in plan.places.values())
    for name, place in plan.places.items():
        assert place.bytes == sizes[name]
        assert place.offset % ALIGNMENT == 0
        assert place.offset + place.bytes <= plan.arenas[place.arena]
    for (arena, _, end), (other, begin, _) in itertools.pairwise(spans):
        assert arena != other or end <= begin
    for index, size in enumerate(plan.arenas):
        members = [p for p in plan.places.values() if p.arena == index]
        assert size <= max(arena_bytes, ALIGNMENT) or len(members) == 1


def plan_of(manifest: Any, **changes: Any) -> PlanInfo:
    layout = state_layout(manifest)
    spec = manifest.model
    inputs = [
        TensorInfo(names.INPUTS_EMBEDS, "float32", ("batch", "tokens", spec.hidden_size)),
        TensorInfo(names.LENGTHS, "int32", ("batch",)),
        *(TensorInfo(t.name, t.dtype, ("batch", *t.shape[1:])) for t in layout),
    ]
    outputs = [
        TensorInfo(names.LOGITS, "float32", ("batch", 1, spec.vocab_size)),
        *(TensorInfo(names.present(t.name), t.dtype, ("batch", *t.shape[1:])) for t in layout),
    ]
    plan = PlanInfo(tuple(inputs), tuple(outputs), (), "0" * 64, 1.0, 0, {})
    return dataclasses.replace(plan, **changes)


def bindings_of(manifest: Any, plan: PlanInfo) -> Any:
    spec = manifest.model
    return decoder_bindings(
        "decoder.plan",
        plan,
        state_layout(manifest),
        hidden=spec.hidden_size,
        vocabulary=spec.vocab_size,
        embeds_dtype="float32",
    )


@pytest.mark.parametrize("kv_in_place", [True, False])
def test_ssm_states_are_in_place_conv_states_swap_and_caches_do_what_the_engine_says(kv_in_place: bool) -> None:
    manifest = toy_manifest("hybrid")
    plan = plan_of(manifest)
    if kv_in_place:
        caches = [t.name for t in plan.inputs if t.name.endswith((".key", ".value"))]
        plan = dataclasses.replace(plan, in_place={names.present(name): name for name in caches})
    made = bindings_of(manifest, plan)
    kinds = {binding.past.rsplit(".", 1)[1]: binding.in_place for binding in made.states}
    assert kinds == {"recurrent": True, "conv": False, "key": kv_in_place, "value": kv_in_place}
    sizes = buffer_sizes(made, tokens=16, hidden=manifest.model.hidden_size, scratch=10, vision={})
    for binding in made.states:
        assert (second(binding.past) in sizes) == (not binding.in_place)
        assert sizes[binding.past] == binding.bytes
    assert sizes[names.INPUTS_EMBEDS] == 16 * manifest.model.hidden_size * 4
    assert sizes[names.LOGITS] == manifest.model.vocab_size * 4


def test_logits_of_all_tokens_need_room_for_all() -> None:
    manifest = toy_manifest()
    plan = plan_of(manifest)
    logits = TensorInfo(names.LOGITS, "float32", ("batch", "tokens", manifest.model.vocab_size + 3))
    made = bindings_of(manifest, dataclasses.replace(plan, outputs=(logits, *plan.outputs[1:])))
    sizes = buffer_sizes(made, tokens=16, hidden=64, scratch=0, vision={})
    assert sizes[names.LOGITS] == 16 * (manifest.model.vocab_size + 3) * 4


def without(tensors: tuple[TensorInfo, ...], name: str) -> tuple[TensorInfo, ...]:
    return tuple(t for t in tensors if t.name != name)


def changed(tensors: tuple[TensorInfo, ...], name: str, **fields: Any) -> tuple[TensorInfo, ...]:
    return tuple(dataclasses.replace(t, **fields) if t.name == name else t for t in tensors)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: {"inputs": without(p.inputs, names.INPUTS_EMBEDS)}, "no inputs_embeds"),
        (lambda p: {"inputs": changed(p.inputs, names.INPUTS_EMBEDS, dtype="float16")}, "float16"),
        (lambda p: {"inputs": changed(p.inputs, names.INPUTS_EMBEDS, shape=("B", "T", 7))}, "7"),
        (lambda p: {"inputs": changed(p.inputs, names.LENGTHS, dtype="int64")}, "int64"),
        (lambda p: {"inputs": without(p.inputs, "past.0.conv")}, "no past.0.conv"),
        (lambda p: {"inputs": (*p.inputs, TensorInfo("past.99.conv", "float32", (1,)))}, "past.99.conv"),
        (lambda p: {"outputs": without(p.outputs, "present.0.recurrent")}, "no present.0.recurrent"),
        (lambda p: {"outputs": changed(p.outputs, "present.0.recurrent", shape=("B", 1))}, "present.0.recurrent"),
        (lambda p: {"outputs": changed(p.outputs, names.LOGITS, shape=("B", 1, 3))}, "width 3"),
        (lambda p: {"outputs": changed(p.outputs, names.LOGITS, shape=("B", 1, "V"))}, "width V"),
        (lambda p: {"in_place": {"present.0.conv": "past.1.conv"}}, "past.1.conv"),
    ],
)
def test_tensor_that_does_not_fit_the_model_is_refused(change: Any, told: str) -> None:
    manifest = toy_manifest()
    plan = plan_of(manifest)
    bindings_of(manifest, plan)
    with pytest.raises(EngineError) as caught:
        bindings_of(manifest, dataclasses.replace(plan, **change(plan)))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "outputs", "told"),
    [
        ((), (TensorInfo(names.IMAGE_FEATURES, "float16", ("t", 64)),), "no pixel_values"),
        ((TensorInfo(names.PIXEL_VALUES, "float32", ("t", 3, 8, 8)),), (), "no image_features"),
        (
            (TensorInfo(names.PIXEL_VALUES, "float16", ("t", 3, 8, 8)),),
            (TensorInfo(names.IMAGE_FEATURES, "float16", ("t", 64)),),
            "float16",
        ),
        (
            (TensorInfo(names.PIXEL_VALUES, "float32", ("t", 3, 8, 8)), TensorInfo("more", "int32", (1,))),
            (TensorInfo(names.IMAGE_FEATURES, "float16", ("t", 64)),),
            "more",
        ),
    ],
)
def test_vision_tensor_that_does_not_fit_is_refused(inputs: Any, outputs: Any, told: str) -> None:
    plan = PlanInfo(inputs, outputs, (), "0" * 64, 1.0, 0, {})
    with pytest.raises(EngineError) as caught:
        vision_output_dtype("vision.plan", plan, tile=(3, 8, 8), hidden=64)
    assert told in str(caught.value)


def profiled(**ranges: ShapeRange) -> PlanInfo:
    profiles = tuple(ProfileInfo(name, {names.INPUTS_EMBEDS: r}) for name, r in ranges.items())  # type: ignore[arg-type]
    return PlanInfo((), (), profiles, "0" * 64, 1.0, 0, {})


def test_one_token_takes_the_decode_profile_and_more_take_prefill_with_its_padding() -> None:
    profiles = decoder_profiles("decoder.plan", profiled(decode=DECODE, prefill=PREFILL), names.INPUTS_EMBEDS)
    assert profiles.decode is not None
    assert (profiles.decode.index, profiles.prefill.index) == (0, 1)
    assert profiles.choose(1) == (profiles.decode, 1)
    assert profiles.choose(2) == (profiles.prefill, 2)
    assert profiles.choose(16) == (profiles.prefill, 16)
    alone = decoder_profiles("decoder.plan", profiled(prefill=PREFILL), names.INPUTS_EMBEDS)
    assert alone.choose(1) == (alone.prefill, 2)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (profiled(decode=DECODE), "no prefill profile"),
        (profiled(prefill=ShapeRange((2, 1, 64), (2, 1, 64), (4, 8, 64))), "batches of 2 to 4"),
        (profiled(prefill=PREFILL, decode=ShapeRange((1, 2, 64), (1, 2, 64), (1, 2, 64))), "takes 1 token"),
    ],
)
def test_profiles_that_cannot_run_one_sequence_are_refused(plan: PlanInfo, told: str) -> None:
    with pytest.raises(EngineError) as caught:
        decoder_profiles("decoder.plan", plan, names.INPUTS_EMBEDS)
    assert told in str(caught.value)


def test_vision_profile_begins_at_one_tile() -> None:
    def plan(least: int) -> PlanInfo:
        sizes = ShapeRange((least, 3, 8, 8), (least, 3, 8, 8), (13, 3, 8, 8))
        return PlanInfo((), (), (ProfileInfo("tiles", {names.PIXEL_VALUES: sizes}),), "0" * 64, 1.0, 0, {})

    assert vision_profile("vision.plan", plan(1), names.PIXEL_VALUES).most == 13
    with pytest.raises(EngineError, match=r"vision\.plan"):
        vision_profile("vision.plan", plan(2), names.PIXEL_VALUES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embeddings_are_rows_of_the_table_with_features_in_the_places_of_image_tokens(
    tmp_path: Path, dtype: str
) -> None:
    kind: Any = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    table = (np.arange(40) * 3).reshape(10, 4).astype(kind)
    table.tofile(tmp_path / "table")
    rows = EmbeddingRows(tmp_path, EmbeddingTable("table", dtype, 10, 4), image_token_id=7)
    assert rows.width == 4
    target = np.zeros((5, 4), kind)
    features = np.full((2, 4), 99).astype(kind)
    features[1] = 98
    rows.write(target, np.array([1, 7, 9, 7, 0]), features)
    np.testing.assert_array_equal(target, np.stack([table[1], features[0], table[9], features[1], table[0]]))


def test_table_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(b"12")
    with pytest.raises(EngineError, match="unknown type"):
        EmbeddingRows(tmp_path, EmbeddingTable("table", "int4", 1, 4), 0)
