"""The whole oracle: against a second formulation in torch, against itself cut in pieces, and on odd checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleModel, OracleResult, relative_error
from oracle.attention import KVState
from oracle.mamba2 import Mamba2State
from oracle_checks.second_formulation import run_model
from oracle_checks.tiny_checkpoint import IMAGE_TOKEN, Sizes, config_of, random_tensors, write_tiny

# float64 against float64 through a handful of layers, each of which enlarges what the one before rounded.
EXACT = 1e-11

LINEAR = Sizes()
HYBRID = Sizes(kinds=(("mha", "mamba2"), ("mha", "mamba2", "mamba2")))
TEACHER = Sizes(kinds=(("mha",), ("mha", "mha")))
ODD = Sizes(
    kinds=(("mamba2",), ("mamba2", "mha")), hidden=33, heads=4, kv_heads=1, head_dim=16, conv_width=4, special=3
)
MODELS = {"linear": LINEAR, "hybrid": HYBRID, "teacher": TEACHER, "odd": ODD}


@pytest.fixture(scope="module", params=MODELS)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def model(sizes: Sizes, tmp_path_factory: pytest.TempPathFactory) -> OracleModel:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), config_of(sizes), random_tensors(sizes, 21))
    return OracleModel.from_checkpoint(folder)


def _prompt(sizes: Sizes, tokens: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Ids with the 8 tokens of two image tiles of 16 pixels in their midst, and those tiles."""
    random = np.random.default_rng(22)
    ids = random.integers(0, sizes.vocab + sizes.special, tokens)
    ids[ids == IMAGE_TOKEN] = 0
    ids[[4, 5, 6, 7, 12, 13, 14, 15]] = IMAGE_TOKEN
    return ids, random.standard_normal((2, 3, 4 * sizes.patch, 4 * sizes.patch))


def _double(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in tensors.items()}


def _same(found: OracleResult, wanted: OracleResult, start: int = 0) -> None:
    """`found` has the last tokens of `wanted`, from `start` on, and ends in the same state."""
    assert relative_error(found.logits, wanted.logits[start:]) < EXACT
    for one, other in zip(found.layer_outputs, wanted.layer_outputs, strict=True):
        assert relative_error(one, other[start:]) < EXACT
    assert found.state.tokens == wanted.state.tokens
    for after, end in zip(found.state.layers, wanted.state.layers, strict=True):
        assert type(after) is type(end)
        for name, value in vars(end).items():
            assert relative_error(getattr(after, name), value) < EXACT


@pytest.mark.parametrize("normalize", [False, True])
def test_whole_model_agrees_with_the_torch_formulation(sizes: Sizes, normalize: bool, tmp_path: Path) -> None:
    config, tensors = config_of(sizes), random_tensors(sizes, 21)
    config["normalize_encoder_output"] = normalize
    ids, pixels = _prompt(sizes)
    found = OracleModel.from_checkpoint(write_tiny(tmp_path, config, tensors)).forward(ids, pixels)
    logits, outputs = run_model(_double(tensors), config, sizes, torch.from_numpy(ids), torch.from_numpy(pixels))
    assert found.logits.shape == (25, sizes.vocab)
    assert relative_error(found.logits, logits) < EXACT
    assert len(found.layer_outputs) == len(sizes.kinds[0] + sizes.kinds[1])
    for one, other in zip(found.layer_outputs, outputs, strict=True):
        assert relative_error(one, other) < EXACT


def test_states_have_the_shapes_of_their_layers(model: OracleModel, sizes: Sizes) -> None:
    state = model.forward(*_prompt(sizes)).state
    kinds = sizes.kinds[0] + sizes.kinds[1]
    assert model.kinds == kinds
    channels = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    for kind, layer in zip(kinds, state.layers, strict=True):
        if kind == "mamba2":
            assert isinstance(layer, Mamba2State)
            assert layer.conv.shape == (1, channels, sizes.conv_width - 1)
            assert layer.ssm.shape == (1, sizes.heads, sizes.head_dim, sizes.head_dim)
        else:
            assert isinstance(layer, KVState)
            assert layer.key.shape == layer.value.shape == (1, sizes.kv_heads, 25, sizes.head_dim)


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 25), max_size=4).map(sorted))
@pytest.mark.parametrize("kind", ["linear", "hybrid", "odd"])
def test_split_anywhere_equals_one_run(kind: str, cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / f"split-{kind}"
    if not folder.exists():
        write_tiny(folder, config_of(MODELS[kind]), random_tensors(MODELS[kind], 21))
    model = OracleModel.from_checkpoint(folder)
    whole = model.forward(*_prompt(MODELS[kind]))
    state = None
    for start, end in zip([0, *cuts], [*cuts, 25], strict=True):  # cuts may fall inside an image
        part = model.forward_embeds(whole.embeds[start:end], state)
        state = part.state
    _same(part, whole, start)


def test_prefill_then_single_steps_equals_one_prefill(model: OracleModel, sizes: Sizes) -> None:
    ids, pixels = _prompt(sizes)
    whole = model.forward(ids, pixels)
    part = model.forward(ids[:17], pixels)
    for t in range(17, 25):
        part = model.forward(ids[t : t + 1], state=part.state)
        assert relative_error(part.logits[0], whole.logits[t]) < EXACT
    _same(part, whole, 24)


def test_continuing_leaves_the_given_state_alone(model: OracleModel, sizes: Sizes) -> None:
    ids, pixels = _prompt(sizes)
    before = model.forward(ids, pixels).state
    first = model.forward([1, 2, 3], state=before)
    _same(model.forward([1, 2, 3], state=before), first)
    assert before.tokens == 25


def test_no_token_sees_a_later_one(model: OracleModel, sizes: Sizes) -> None:
    ids, pixels = _prompt(sizes)
    other = ids.copy()
    other[20] = 1 if ids[20] != 1 else 2
    one, two = model.forward(ids, pixels), model.forward(other, pixels)
    np.testing.assert_array_equal(one.logits[:20], two.logits[:20])
    assert (np.abs(one.logits[20:] - two.logits[20:]).max(axis=1) > 1e-6).all()


def test_image_tokens_take_the_features_in_order(model: OracleModel, sizes: Sizes) -> None:
    ids, pixels = _prompt(sizes)
    features = model.image_features(pixels)
    embeds = model.forward(ids, pixels).embeds
    assert len(features) == 8
    np.testing.assert_array_equal(embeds[[4, 5, 6, 7, 12, 13, 14, 15]], features)
    np.testing.assert_array_equal(embeds[[0, 24]], model.embed(ids[[0, 24]]))


def test_image_count_that_does_not_match_is_refused(model: OracleModel, sizes: Sizes) -> None:
    ids, pixels = _prompt(sizes)
    for wrong_ids, wrong_pixels in ((ids, pixels[:1]), (ids, None), (ids[:4], pixels)):
        with pytest.raises(ValueError, match="image tokens in the prompt"):
            model.forward(wrong_ids, wrong_pixels)


def test_special_ids_read_the_special_table(tmp_path: Path) -> None:
    tensors = random_tensors(ODD, 23)
    model = OracleModel.from_checkpoint(write_tiny(tmp_path, config_of(ODD), tensors))
    special = tensors["embedding_model.special_text_embeddings.weight"]
    np.testing.assert_array_equal(model.embed([ODD.vocab + 2, ODD.vocab]), special[[2, 0]].astype(np.float64))
    with pytest.raises(ValueError, match="the table has 53 rows"):
        model.embed([ODD.vocab + 3])


def test_tensors_win_over_labels_and_labels_decide_between_both(tmp_path: Path) -> None:
    config, tensors = config_of(HYBRID), random_tensors(HYBRID, 24)
    ids, pixels = _prompt(HYBRID)
    wanted = OracleModel.from_checkpoint(write_tiny(tmp_path / "right", config, tensors)).forward(ids, pixels)
    config["llm_config"]["layers_block_type"] = ["mamba2", "mha", "mamba2"]
    wrong = OracleModel.from_checkpoint(write_tiny(tmp_path / "wrong", config, tensors))
    assert wrong.kinds == HYBRID.kinds[0] + HYBRID.kinds[1]
    del config["llm_config"]["layers_block_type"]
    _same(OracleModel.from_checkpoint(write_tiny(tmp_path / "none", config, tensors)).forward(ids, pixels), wanted)

    extra = random_tensors(LINEAR, 25)
    prefix = "embedding_model.encoder.0.attention."
    tensors.update({name: value for name, value in extra.items() if name.startswith(prefix)})
    both = OracleModel.from_checkpoint(write_tiny(tmp_path / "both", config, tensors))
    assert both.kinds[0] == "mha"
    _same(both.forward(ids, pixels), wanted)


@pytest.mark.parametrize(("part", "default"), [("embedding_config", 1e-5), ("llm_config", 1e-6)])
def test_an_absent_epsilon_is_the_default_of_its_class(part: str, default: float, tmp_path: Path) -> None:
    config, tensors = config_of(LINEAR), random_tensors(LINEAR, 26)
    ids = [1, 2, 3]
    del config[part]["rms_norm_eps"]
    absent = OracleModel.from_checkpoint(write_tiny(tmp_path / "absent", config, tensors)).forward(ids)
    config[part]["rms_norm_eps"] = default
    _same(OracleModel.from_checkpoint(write_tiny(tmp_path / "given", config, tensors)).forward(ids), absent)
    config[part]["rms_norm_eps"] = 1e-3 + 1e-2
    other = OracleModel.from_checkpoint(write_tiny(tmp_path / "other", config, tensors)).forward(ids)
    assert relative_error(other.logits, absent.logits) > 1e-6


def test_rope_scaling_matters_only_for_the_teacher_policy_and_beyond_its_length(tmp_path: Path) -> None:
    config = config_of(TEACHER)
    for part in (config["embedding_config"], config["llm_config"]):
        part.update(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=20)
    folder = write_tiny(tmp_path, config, random_tensors(TEACHER, 27))
    ignoring = OracleModel.from_checkpoint(folder)
    scaling = OracleModel.from_checkpoint(folder, rope_scaling="teacher")
    ids, pixels = _prompt(TEACHER)
    _same(scaling.forward(ids[:20], pixels), ignoring.forward(ids[:20], pixels))
    assert relative_error(scaling.forward(ids, pixels).logits, ignoring.forward(ids, pixels).logits) > 1e-3


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"pixel_shuffle_loc": "post"}, "", "pixel_shuffle_loc"),
    ({"use_ls": True}, "", "layer scale"),
    ({}, "language_model.model.layers.1.attention.D", "attention.D"),
    ({}, "language_model.model.layers.0.attention.q_norm.weight", "q_norm"),
]


@pytest.mark.parametrize(("change", "extra", "word"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_the_oracle_does_not_compute_is_refused(
    change: dict[str, Any], extra: str, word: str, tmp_path: Path
) -> None:
    config, tensors = config_of(LINEAR), random_tensors(LINEAR, 28)
    config["embedding_config"].update(change)
    if extra:
        tensors[extra] = np.ones(6, dtype=np.float32)
    with pytest.raises(ValueError, match=word):
        OracleModel.from_checkpoint(write_tiny(tmp_path, config, tensors))
