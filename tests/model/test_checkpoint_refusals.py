"""Checkpoints that cannot be used: each is refused with one error that names what is at fault, found and wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import ABSENT, tiny_spec, write_checkpoint
from mmm_export.spec import ModelSpec

EMBEDDING_LAYER = "embedding_model.encoder.0."
LLM_LAYER = "language_model.model.layers.2."


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., CheckpointError]:
    """Write a tiny checkpoint without tokenizer, try to open it, and give the error."""

    def write(spec: ModelSpec | None = None, rope_scaling: Any = "ignore", **options: Any) -> CheckpointError:
        options.setdefault("tokenizer", False)
        return error_of(write_checkpoint(tmp_path, spec or tiny_spec(), **options), rope_scaling)

    return write


def error_of(folder: Path, rope_scaling: Any = "ignore") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, rope_scaling=rope_scaling)
    assert caught.value.found or caught.value.wanted
    return caught.value


def written(folder: Path, **options: Any) -> Path:
    return write_checkpoint(folder, tiny_spec(), tokenizer=False, **options)


# Folder and config.json.


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "nothing at this path" in str(error_of(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.write_text("x")
    assert "a file" in str(error_of(file))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in str(error_of(tmp_path))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"model_type": "llama"}', "llama"),
        ('{"embedding_config": {}}', "no llm_config"),
        ('{"embedding_config": [], "llm_config": {}}', "embedding_config has an unusable value"),
    ],
)
def test_a_config_that_describes_no_mmmamba_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (written(tmp_path) / "config.json").write_text(text)
    assert part in str(error_of(tmp_path))


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (written(tmp_path) / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not JSON" in str(error_of(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llm_config.hidden_size", "64"),
        ("llm_config.hidden_size", 64.0),
        ("llm_config.hidden_size", True),
        ("llm_config.hidden_size", 0),
        ("llm_config.hidden_size", 10**400),
        ("llm_config.num_hidden_layers", -1),
        ("llm_config.rms_norm_eps", 0),
        ("llm_config.rms_norm_eps", float("nan")),
        ("llm_config.rms_norm_eps", float("inf")),
        ("llm_config.rope_theta", "10000"),
        ("llm_config.rope_scaling", 2.0),
        ("llm_config.layers_block_type", 3),
        ("llm_config.layers_block_type", [1, 2]),
        ("llm_config.tie_word_embeddings", "no"),
        ("embedding_config.img_context_token_id", -1),
        ("embedding_config.special_token_maps", []),
        ("embedding_config.pixel_shuffle_loc", 1),
        ("dynamic_image_size", 1),
        ("force_image_size", [448, 448]),
        ("downsample_ratio", "half"),
        ("template", 5),
        ("architectures", 5),
        ("torch_dtype", 16),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(refused: Any, key: str, value: Any) -> None:
    error = refused(config_overrides={key: value})
    assert f"config.json: {key} has an unusable value" in error.what


@pytest.mark.parametrize(
    ("key", "value", "true"),
    [
        ("num_attention_heads", 8, 4),
        ("num_key_value_heads", 4, 2),
        ("hidden_size", 128, 64),
        ("intermediate_size", 96, 128),
        ("head_dim", 32, 16),
    ],
)
@pytest.mark.parametrize("part", ["embedding_config", "llm_config"])
def test_a_size_that_the_tensors_contradict_is_refused(
    refused: Any, part: str, key: str, value: int, true: int
) -> None:
    error = refused(config_overrides={f"{part}.{key}": value})
    assert f"config.json: {part}.{key} disagrees with the tensors" in error.what
    assert str(value) in error.found
    assert error.wanted.startswith(f"{true},")


@pytest.mark.parametrize("key", ["embedding_config.llm_vocab_size", "llm_config.vocab_size"])
def test_a_vocabulary_that_the_tensors_contradict_is_refused(refused: Any, key: str) -> None:
    error = refused(config_overrides={key: 92553})
    assert key in error.what
    assert error.wanted.startswith("512,")


def test_wrong_head_counts_of_an_attention_model_are_refused(refused: Any) -> None:
    spec = tiny_spec(kinds="teacher")
    assert "num_key_value_heads" in refused(spec, config_overrides=heads_everywhere(8)).what
    assert "a divisor of 64" in refused(spec, config_overrides=heads_everywhere(5)).wanted
    assert "llm_config" in refused(spec, config_overrides={"llm_config.num_attention_heads": 8}).what
    error = refused(spec, config_overrides=heads_everywhere(ABSENT))
    assert "does not state num_attention_heads" in error.what


def heads_everywhere(count: Any) -> dict[str, Any]:
    return {f"{part}.num_attention_heads": count for part in ("embedding_config", "llm_config")}


def test_heads_that_do_not_share_evenly_are_refused(refused: Any) -> None:
    error = refused(tiny_spec(heads=4, kv_heads=3, head_dim=16))
    assert error.found == "4 heads over 3 key-value heads"


@pytest.mark.parametrize("width", [1, 5])
def test_an_unsupported_convolution_width_lists_the_supported_ones(refused: Any, width: int) -> None:
    error = refused(tiny_spec(conv_width=width))
    assert f"width {width}" in error.what
    assert error.wanted == "one of 2, 3, 4"


def test_tiles_that_cannot_be_cut_into_patches_are_refused(refused: Any) -> None:
    error = refused(config_overrides={"force_image_size": 70})
    assert error.wanted == "a multiple of 28 pixels"


def test_an_empty_range_of_tile_counts_is_refused(refused: Any) -> None:
    assert "max_dynamic_patch" in refused(config_overrides={"min_dynamic_patch": 13}).what


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"embedding_config.use_ls": True}, "use_ls"),
        ({"embedding_config.pixel_shuffle_loc": "post"}, "pixel_shuffle_loc"),
        ({"pixel_shuffle_loc": "post"}, "pixel_shuffle_loc"),
        ({"llm_config.hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_variant_that_no_released_model_has_is_refused(refused: Any, overrides: dict[str, Any], part: str) -> None:
    error = refused(config_overrides=overrides)
    assert part in error.what
    assert "not supported" in error.what


@pytest.mark.parametrize("name", ["attention.D", "attention.q_norm.weight", "attention.k_norm.bias", "ls1"])
def test_tensors_of_parts_the_scan_does_not_have_are_refused(refused: Any, name: str) -> None:
    error = refused(extra={LLM_LAYER + name: np.ones(4)})
    assert "not supported" in error.what
    assert error.found == f"tensor {LLM_LAYER}{name}"


def test_the_teacher_policy_needs_a_scaling_it_can_follow(refused: Any) -> None:
    spec = tiny_spec(kinds="teacher")
    for scaling in ({"type": "yarn", "factor": 2.0}, {"type": "dynamic"}, {}):
        error = refused(spec, "teacher", config_overrides={"llm_config": {"rope_scaling": scaling}})
        assert "rope_scaling cannot be followed" in error.what


@pytest.mark.parametrize("token_id", [512, 2**31])
def test_an_image_token_outside_the_vocabulary_is_refused(refused: Any, token_id: int) -> None:
    assert "img_context_token_id" in refused(config_overrides={"embedding_config.img_context_token_id": token_id}).what


def test_a_default_image_token_outside_the_vocabulary_says_that_it_is_the_default(refused: Any) -> None:
    error = refused(config_overrides={"embedding_config.img_context_token_id": ABSENT})
    assert error.found == "id 92546, the default, since it is not stated"


def test_special_tokens_that_disagree_with_their_table_are_refused(refused: Any) -> None:
    spec = tiny_spec(special_tokens=2)
    error = refused(spec, config_overrides={"embedding_config.special_token_maps": {"<x>": 514}})
    assert (error.found, error.wanted[:2]) == ("3 special tokens", "2,")
    assert tensors.SPECIAL_TABLE in refused(spec, drop=[tensors.SPECIAL_TABLE]).what


# Layers.


def test_a_stack_stated_larger_than_its_tensors_names_the_missing_one(refused: Any) -> None:
    error = refused(config_overrides={"llm_config.num_hidden_layers": 24})
    assert "language_model.model.layers.3.attention_norm.weight is missing" in error.what
    assert "24 layers" in error.wanted


def test_a_stack_stated_smaller_than_its_tensors_names_the_surplus(refused: Any) -> None:
    error = refused(config_overrides={"llm_config.num_hidden_layers": 2})
    assert "tensor language_model.model.layers.2." in error.what
    assert "2 layers" in error.wanted


@pytest.mark.parametrize("stated", [True, False])
def test_a_gap_between_layers_is_named(refused: Any, stated: bool) -> None:
    spec = tiny_spec()
    prefix = "language_model.model.layers.1."
    gap = [name for name in tensors.required_shapes(spec) if name.startswith(prefix)]
    overrides = {} if stated else {"llm_config.num_hidden_layers": ABSENT}
    assert f"{prefix}attention_norm.weight is missing" in refused(spec, drop=gap, config_overrides=overrides).what


def test_a_huge_layer_number_is_refused_at_once(refused: Any) -> None:
    name = "language_model.model.layers.999999999.ffn_norm.weight"
    error = refused(extra={name: np.ones(64)}, config_overrides={"llm_config.num_hidden_layers": ABSENT})
    assert "layers.3.attention_norm.weight is missing" in error.what


def test_a_layer_without_a_mixer_is_refused(refused: Any) -> None:
    drop = [LLM_LAYER + tensors.MAMBA_PROJECTION]
    assert LLM_LAYER + tensors.MAMBA_PROJECTION in refused(drop=drop).what
    unlabelled = refused(drop=drop, layers_block_type=False)
    assert f"{tensors.MAMBA_PROJECTION} or {LLM_LAYER}{tensors.ATTENTION_PROJECTION}" in unlabelled.what


def test_a_layer_with_two_mixers_and_no_label_is_refused(refused: Any) -> None:
    spec = tiny_spec()
    mha = {LLM_LAYER + name: np.zeros(shape) for name, shape in tensors.mixer_shapes(spec, "mha").items()}
    assert "two mixers and no label" in refused(spec, extra=mha, layers_block_type=False).what


@pytest.mark.parametrize("where", ["embedding_config.layers_block_type", "layers_block_type"])
def test_an_unknown_layer_kind_lists_the_known_ones(refused: Any, where: str) -> None:
    error = refused(config_overrides={where: ["mamba3"]})
    assert where in error.what
    assert (error.found, error.wanted) == ("'mamba3' for layer 0", "mamba2 or mha")


# Tensors.


@pytest.mark.parametrize("kinds", ["linear", "hybrid"])
def test_every_missing_tensor_is_named(refused: Any, kinds: str) -> None:
    spec = tiny_spec(kinds=kinds, embedding_layers=1, llm_layers=1)
    for name in tensors.required_shapes(spec):
        if name.startswith("embedding_model.pixel_shuffle_proj") and kinds == "linear":
            continue  # the same for both kinds
        error = refused(spec, drop=[name])
        assert f"{name} is missing" in error.what or f"tensor {name} or " in error.what, name


def test_every_misshaped_tensor_is_named(refused: Any) -> None:
    spec = tiny_spec()
    for name, shape in tensors.required_shapes(spec).items():
        if ".layers.0." in name or ".layers.1." in name:
            continue  # layer 2 stands for them
        for wrong in ((*shape[:-1], shape[-1] + 3), (*shape, 2)):
            error = refused(spec, extra={name: np.ones(wrong)})
            assert name in str(error), (name, wrong, str(error))


def test_a_misshaped_tensor_is_told_with_both_shapes(refused: Any) -> None:
    error = refused(extra={LLM_LAYER + "attention.dt_bias": np.ones(5)})
    assert (error.what, error.found, error.wanted) == (
        f"tensor {LLM_LAYER}attention.dt_bias has the wrong shape",
        "[5]",
        "[4]",
    )


def test_an_unknown_tensor_is_named(refused: Any) -> None:
    assert "tensor lora.A belongs to no part" in refused(extra={"lora.A": np.ones(3)}).what


def test_a_renamed_tensor_is_suggested(refused: Any) -> None:
    error = refused(drop=[tensors.FINAL_NORM], extra={"language_model.model.norms.weight": np.ones(64)})
    assert error.hint == "is language_model.model.norms.weight meant?"


def test_a_last_stage_checkpoint_is_told_how_to_convert_it(refused: Any) -> None:
    spec = tiny_spec()
    lost = [name for name in tensors.required_shapes(spec) if name.endswith(("dt_bias", "A_log_bias"))]
    error = refused(spec, drop=lost)
    assert "A_log_bias is missing" in error.what
    assert "stage" in error.hint


@pytest.mark.parametrize("numbers", [np.float64, np.int8])
def test_an_unsupported_number_format_is_named_with_its_tensor(tmp_path: Path, numbers: Any) -> None:
    path = written(tmp_path, dtype="fp32") / "model.safetensors"
    content = load_file(path)
    content[tensors.FINAL_NORM] = content[tensors.FINAL_NORM].astype(numbers)
    save_file(content, path)
    error = error_of(tmp_path)
    assert tensors.FINAL_NORM in error.what
    assert error.found in ("F64", "I8")
    assert error.wanted == "F32, F16, BF16"


def test_attention_with_an_odd_head_dim_is_refused(refused: Any) -> None:
    error = refused(tiny_spec(kinds=("mha", "mamba2"), head_dim=7))
    assert error.found == "head_dim 7"
    assert "even" in error.wanted
