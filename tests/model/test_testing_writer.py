"""Written checkpoints: the released layout, reproducible weights, a tokenizer that works, weights that make sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from mmm_export.errors import OptionError
from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import SPECIAL_TOKENS, full_size_spec, tiny_spec, vocab_size_for, write_checkpoint
from mmm_export.model.testing.released_config import config_from_spec, overridden
from mmm_export.model.testing.vocabulary import trained_model, write_tokenizer
from mmm_export.model.testing.weights import BLOCK_VALUES, tensor_blocks
from mmm_export.model.testing.writer import stored_bytes

RELEASED_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
}


def test_a_checkpoint_has_every_released_file(tmp_path: Path) -> None:
    assert {path.name for path in write_checkpoint(tmp_path, tiny_spec()).iterdir()} == RELEASED_FILES


@pytest.mark.parametrize(
    ("kind", "count", "parameters"),
    [("linear", 396, 2_741_992_448), ("hybrid", 356, 2_708_076_288), ("teacher", 236, 2_606_327_808)],
)
def test_full_size_models_have_the_released_tensors(kind: str, count: int, parameters: int) -> None:
    spec = full_size_spec(kind)  # type: ignore[arg-type]
    shapes = tensors.required_shapes(spec) | tensors.unused_shapes(spec)
    assert len(shapes) == count
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    assert spec.attention_layers == {"linear": (), "hybrid": tuple(range(0, 32, 4)), "teacher": tuple(range(32))}[kind]


def test_the_full_size_vocabulary_has_the_released_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 92553)
    added = (tmp_path / "added_tokens.json").read_bytes()
    assert json.loads(added)["<IMG_CONTEXT>"] == full_size_spec("linear").image_token_id == 92546
    assert (len(added), added.count(b"\n")) == (179, 11)  # size of the released file
    decoder = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    placed = {int(index): entry["content"] for index, entry in decoder.items()}
    assert placed == {0: "<unk>", 1: "<s>", 2: "</s>"} | {92538 + i: token for i, token in enumerate(SPECIAL_TOKENS)}
    assert placed[92542] == "<|im_end|>"
    assert vocab_size_for(tmp_path / "tokenizer.model") == 92553


def test_the_tokenizer_reads_back_what_it_wrote(tmp_path: Path) -> None:
    from mmm_export.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(write_checkpoint(tmp_path, tiny_spec()))
    assert tokenizer.vocab_size == tiny_spec().vocab_size
    text = "What is in the image? 图片里有什么 \N{GRINNING FACE}\n"
    ids = tokenizer.encode(text + "<|im_end|>")
    assert ids[0] == tokenizer.bos_id == 1
    assert ids[-1] == tokenizer.token_id("<|im_end|>") == 512 - 15 + 4
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_the_trained_tokenizer_is_always_the_same() -> None:
    first = trained_model(497)
    trained_model.cache_clear()
    assert trained_model(497) == first


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="too small for a tokenizer"):
        write_checkpoint(tmp_path, tiny_spec(vocab_size=299))
    write_checkpoint(tmp_path, tiny_spec(vocab_size=300))


def test_a_given_tokenizer_must_fit_the_vocabulary(tmp_path: Path) -> None:
    source = tmp_path / "given.model"
    source.write_bytes(trained_model(400))
    with pytest.raises(OptionError) as caught:
        write_checkpoint(tmp_path / "a", tiny_spec(), tokenizer=source)
    assert "vocab_size 415" in str(caught.value.wanted)
    folder = write_checkpoint(tmp_path / "b", tiny_spec(vocab_size=vocab_size_for(source)), tokenizer=source)
    assert (folder / "tokenizer.model").read_bytes() == source.read_bytes()
    assert Checkpoint.open(folder).findings == ()


def test_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    spec = tiny_spec()
    first = load_file(write_checkpoint(tmp_path / "a", spec, dtype="fp32") / "model.safetensors")
    deeper = tiny_spec(llm_layers=3, special_tokens=1)
    second = load_file(write_checkpoint(tmp_path / "b", deeper, dtype="fp32") / "model.safetensors")
    third = load_file(write_checkpoint(tmp_path / "c", spec, dtype="fp32", seed=1) / "model.safetensors")
    for name, value in first.items():
        assert np.array_equal(value, second[name])
        assert not np.array_equal(value, third[name])


def test_no_two_tensors_are_equal(tmp_path: Path) -> None:
    written = load_file(write_checkpoint(tmp_path, tiny_spec(), dtype="fp32") / "model.safetensors")
    assert len({value.tobytes() for value in written.values()}) == len(written)
    assert all(np.isfinite(value).all() for value in written.values())


@pytest.mark.parametrize(
    ("dtype", "target"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_rounding_is_that_of_torch(dtype: str, target: torch.dtype) -> None:
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 65504.0, 1e-8, 0.0, -0.0], np.float32)
    noise = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values = np.concatenate([halfway, noise])
    wanted = torch.from_numpy(values).to(target).view(torch.uint8).numpy().tobytes()
    assert stored_bytes(values, dtype) == wanted  # type: ignore[arg-type]


def test_weights_in_several_blocks_are_written_in_order(tmp_path: Path) -> None:
    spec = tiny_spec(hidden_size=256, heads=4, intermediate_size=BLOCK_VALUES // 256 * 2 + 3)
    name = "language_model.model.layers.0.feed_forward.w1.weight"
    folder = write_checkpoint(tmp_path, spec, dtype="fp32", tokenizer=False)
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = file.get_tensor(name)
    blocks = list(tensor_blocks(spec, name, stored.shape, 0))
    assert len(blocks) == 3
    assert np.array_equal(np.concatenate(blocks), stored.reshape(-1))


def test_delta_rows_are_the_quiet_ones_across_blocks() -> None:
    spec = tiny_spec(hidden_size=512, heads=4, head_dim=128, kv_heads=2)
    shape = (spec.projected_size, 512)
    rows = np.concatenate(list(tensor_blocks(spec, "x." + tensors.MAMBA_PROJECTION, shape, 0))).reshape(shape)
    # Uniform noise has a largest value of sqrt(3) deviations; 512 of them come within 5 % of it.
    largest = np.abs(rows).max(axis=1) * np.sqrt(512 / 3)
    assert largest[:-4].min() > 0.95
    assert largest[-4:].max() <= 0.5 + 1e-6


def test_initial_decays_and_step_sizes_are_as_published(tmp_path: Path) -> None:
    written = load_file(write_checkpoint(tmp_path, tiny_spec(heads=32, head_dim=4), dtype="fp32") / "model.safetensors")
    for layer in range(3):
        prefix = f"language_model.model.layers.{layer}.attention."
        delta = np.log1p(np.exp(written[prefix + "dt_bias"].astype(np.float64)))
        # softplus of the stored float32 gives the drawn range back to about 7 digits
        assert 0.001 * (1 - 1e-5) <= delta.min() < delta.max() <= 0.1 * (1 + 1e-5)
        rate = np.exp(written[prefix + "A_log_bias"].astype(np.float64))
        assert 1.5 < rate.min() < np.e < rate.max() < 4.5  # around e, one for each head


def test_an_unknown_override_of_the_tiny_model_is_refused() -> None:
    with pytest.raises(TypeError, match="hidden_sizes"):
        tiny_spec(hidden_sizes=3)
    with pytest.raises(TypeError, match="2 kinds for 1 \\+ 2 layers"):
        tiny_spec(kinds=("mha", "mha"), llm_layers=2)


def test_overrides_merge_into_nested_keys() -> None:
    config = config_from_spec(tiny_spec(), dtype="bf16")
    changed = overridden(config, {"llm_config.rope_theta": 7, "llm_config": {"use_cache": False}, "template": None})
    assert changed["llm_config"] == config["llm_config"] | {"rope_theta": 7, "use_cache": False}
    assert changed["template"] is None
    assert config["llm_config"]["rope_theta"] == 1e6
