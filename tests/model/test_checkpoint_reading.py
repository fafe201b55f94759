"""What a checkpoint is read as: every field of config.json, and the defects that conversions leave."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import ABSENT, tiny_spec, write_checkpoint
from mmm_export.spec import ModelSpec, RopeSpec

Write = Callable[..., Checkpoint]
MAMBA_LAYER = "language_model.model.layers.1."


@pytest.fixture
def opened(tmp_path: Path) -> Write:
    """Write a tiny checkpoint without tokenizer and open it; `kinds` and other spec overrides go into `spec`."""

    def write(spec: ModelSpec | None = None, rope_scaling: Any = "ignore", **options: Any) -> Checkpoint:
        options.setdefault("tokenizer", False)
        return Checkpoint.open(write_checkpoint(tmp_path, spec or tiny_spec(), **options), rope_scaling=rope_scaling)

    return write


def has_finding(checkpoint: Checkpoint, *parts: str) -> bool:
    return any(all(part in finding for part in parts) for finding in checkpoint.findings)


def finding_free(checkpoint: Checkpoint) -> bool:
    """Nothing found but the tokenizer that these tests leave out."""
    return all("tokenizer.model" in finding for finding in checkpoint.findings)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 3))
    kinds = st.lists(st.sampled_from(["mamba2", "mha"]), min_size=1, max_size=3)
    embedding, llm = draw(kinds), draw(kinds)
    shuffle = draw(st.integers(1, 2))
    return tiny_spec(
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        hidden_size=draw(st.sampled_from([24, 40])),
        intermediate_size=draw(st.integers(1, 70)),
        vocab_size=draw(st.integers(20, 60)),
        special_tokens=draw(st.integers(0, 2)),
        conv_width=draw(st.integers(2, 4)) if "mamba2" in embedding + llm else 2,
        kinds=tuple(embedding + llm),
        embedding_layers=len(embedding),
        tile_size=draw(st.sampled_from([28, 56, 84])),
        position_grid=draw(st.integers(1, 5)),
        shuffle=shuffle,
        projected=shuffle > 1 or draw(st.booleans()),
        dynamic_tiles=draw(st.booleans()),
        use_thumbnail=draw(st.booleans()),
        min_tiles=draw(st.integers(1, 2)),
        max_tiles=draw(st.integers(2, 9)),
        pad_to_square=draw(st.booleans()),
        normalize_embedding=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope=RopeSpec(draw(st.sampled_from([1e4, 1e6]))),
    )


@given(
    spec=specs(),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    shards=st.integers(1, 4),
    labelled=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_written_model_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, dtype: Any, shards: int, labelled: bool
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    write_checkpoint(folder, spec, dtype=dtype, shards=shards, tokenizer=False, layers_block_type=labelled)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec == spec
    assert checkpoint.dtype == dtype
    assert len(checkpoint.files) == shards
    assert finding_free(checkpoint)
    assert checkpoint.shape(tensors.PATCH_WEIGHT) == (spec.hidden_size, 3, 14, 14)


@pytest.mark.parametrize("kinds", ["linear", "hybrid", "teacher"])
def test_a_complete_checkpoint_has_no_findings(make_checkpoint: Callable[..., Path], kinds: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(kinds))
    assert checkpoint.findings == ()
    assert checkpoint.spec == tiny_spec(kinds=kinds)


def test_opening_loads_no_torch(make_checkpoint: Callable[..., Path]) -> None:
    code = (
        "import sys; from mmm_export.model.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1]).sha256(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(make_checkpoint("hybrid"))], check=False).returncode == 0


def test_tensors_come_as_stored_whatever_the_sharding(tmp_path: Path) -> None:
    spec = tiny_spec()
    single = Checkpoint.open(write_checkpoint(tmp_path / "one", spec, dtype="fp32"))
    sharded = Checkpoint.open(write_checkpoint(tmp_path / "three", spec, dtype="fp32", shards=3))
    assert single.names() == sharded.names()
    for name in single.names():
        assert single.tensor(name).dtype == torch.float32
        assert tuple(single.tensor(name).shape) == single.shape(name)
        assert torch.equal(single.tensor(name), sharded.tensor(name))
    assert single.parameters == sharded.parameters == sum(single.tensor(name).numel() for name in single.names())


# Layer kinds: the tensors decide.


def test_without_labels_the_tensors_tell_the_kinds(opened: Write) -> None:
    checkpoint = opened(tiny_spec(kinds="hybrid"), layers_block_type=False)
    assert checkpoint.spec.kinds == ("mha", "mamba2", "mamba2", "mamba2")
    assert finding_free(checkpoint)


def test_labels_that_contradict_the_tensors_are_reported_and_not_followed(opened: Write) -> None:
    checkpoint = opened(config_overrides={"llm_config.layers_block_type": ["mha", "mamba2", "mha"]})
    assert checkpoint.spec.kinds == ("mamba2",) * 4
    assert has_finding(checkpoint, "layers_block_type is wrong about 2 layers", "layers.0 is mamba2, not mha")


def test_labels_at_the_top_level_choose_between_two_stored_mixers(opened: Write) -> None:
    spec = tiny_spec()
    mha = {f"{MAMBA_LAYER}{name}": np.zeros(shape) for name, shape in tensors.mixer_shapes(spec, "mha").items()}
    overrides = {"layers_block_type": ["mamba2", "mamba2", "mha", "mamba2"]}
    checkpoint = opened(spec, extra=mha, layers_block_type=False, config_overrides=overrides)
    assert checkpoint.spec.kinds == ("mamba2", "mamba2", "mha", "mamba2")
    assert has_finding(checkpoint, "store both mixers", "language_model.model.layers.1")


def test_labels_of_another_number_of_layers_are_ignored_and_reported(opened: Write) -> None:
    checkpoint = opened(config_overrides={"llm_config.layers_block_type": ["mha"]})
    assert checkpoint.spec.kinds == ("mamba2",) * 4
    assert has_finding(checkpoint, "llm_config.layers_block_type", "1 entries for 3 layers")


# Sizes and their fallbacks.

SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")


@pytest.mark.parametrize("kinds", ["linear", "hybrid"])
def test_sizes_that_config_json_leaves_out_follow_from_the_tensors(opened: Write, kinds: str) -> None:
    spec = tiny_spec(kinds=kinds, heads=6, kv_heads=3, head_dim=16)
    parts = {
        f"{part}.{key}": ABSENT
        for part in ("embedding_config", "llm_config")
        for key in (*SIZES, "llm_vocab_size", "vocab_size", "image_size", "patch_size", "num_channels")
    }
    checkpoint = opened(spec, config_overrides=parts | {"force_image_size": ABSENT, "downsample_ratio": ABSENT})
    assert checkpoint.spec == spec
    assert finding_free(checkpoint)


def test_an_attention_model_needs_only_the_number_of_heads(opened: Write) -> None:
    spec = tiny_spec(kinds="teacher", heads=6, kv_heads=2)
    parts = ("embedding_config", "llm_config")
    overrides = {f"{part}.{key}": ABSENT for part in parts for key in SIZES if key != "num_attention_heads"}
    assert opened(spec, config_overrides=overrides).spec == spec


def test_absent_norm_eps_is_the_default_of_its_class(opened: Write) -> None:
    overrides = {"embedding_config.rms_norm_eps": ABSENT, "llm_config.rms_norm_eps": ABSENT}
    checkpoint = opened(config_overrides=overrides)
    assert (checkpoint.spec.embedding.norm_eps, checkpoint.spec.llm.norm_eps) == (1e-5, 1e-6)
    assert has_finding(checkpoint, "llm_config.rms_norm_eps is absent", "1e-06")
    assert has_finding(checkpoint, "embedding_config.rms_norm_eps is absent", "1e-05")


@pytest.mark.parametrize(("kinds", "reported"), [("teacher", True), ("linear", False)])
def test_absent_rope_theta_is_10000_and_reported_where_it_matters(opened: Write, kinds: str, reported: bool) -> None:
    checkpoint = opened(tiny_spec(kinds=kinds), config_overrides={"llm_config.rope_theta": ABSENT})
    assert checkpoint.spec.llm.rope.theta == 10000.0
    assert has_finding(checkpoint, "llm_config.rope_theta") == reported


def test_each_stack_has_its_own_rope_theta(opened: Write) -> None:
    checkpoint = opened(config_overrides={"embedding_config.rope_theta": 500, "llm_config.rope_theta": 2e6})
    assert (checkpoint.spec.embedding.rope.theta, checkpoint.spec.llm.rope.theta) == (500.0, 2e6)


SCALING = {"llm_config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32768}}


def test_rope_scaling_is_ignored_and_reported_by_default(opened: Write) -> None:
    checkpoint = opened(tiny_spec(kinds="hybrid", embedding_layers=0), config_overrides=SCALING)
    assert checkpoint.spec.llm.rope == RopeSpec(1e6)
    assert has_finding(checkpoint, "llm_config.rope_scaling is ignored")


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_the_teacher_policy_follows_rope_scaling(opened: Write, kind: Any) -> None:
    spec = tiny_spec(kinds="teacher", rope=RopeSpec(1e6, kind, 2.0, 32768))
    checkpoint = opened(spec, rope_scaling="teacher")
    assert checkpoint.spec == spec
    assert finding_free(checkpoint)


def test_an_absent_position_limit_is_the_default_of_its_class(opened: Write) -> None:
    overrides = SCALING | {"llm_config.max_position_embeddings": ABSENT}
    checkpoint = opened(tiny_spec(kinds="teacher"), rope_scaling="teacher", config_overrides=overrides)
    assert checkpoint.spec.llm.rope == RopeSpec(1e6, "dynamic", 2.0, 2048)
    assert has_finding(checkpoint, "max_position_embeddings is absent", "2048")


# Labels: the tensors decide.


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        ({"torch_dtype": "float32"}, "torch_dtype is 'float32'"),
        ({"embedding_config.use_pixel_shuffle_proj": False}, "use_pixel_shuffle_proj is false"),
        ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25"),
        ({"embedding_config.downsample_ratio": 1.0}, "embedding_config.downsample_ratio is 1"),
        ({"embedding_config.image_size": 448}, "embedding_config.image_size is 448"),
        ({"embedding_config.patch_size": 16}, "embedding_config.patch_size is 16"),
    ],
)
def test_a_wrong_label_is_reported_and_not_followed(opened: Write, overrides: dict[str, Any], finding: str) -> None:
    checkpoint = opened(config_overrides=overrides)
    assert checkpoint.spec == tiny_spec()
    assert checkpoint.dtype == "bf16"
    assert has_finding(checkpoint, finding)


def test_the_tile_size_falls_back_to_that_of_the_positions(opened: Write) -> None:
    spec = tiny_spec(tile_size=56, position_grid=8)
    assert opened(spec).spec.vision.tile_size == 56
    absent = {"force_image_size": ABSENT}
    for overrides in (
        absent,
        absent | {"embedding_config.image_size": ABSENT},
        absent | {"embedding_config.image_size": 56},
    ):
        assert opened(spec, config_overrides=overrides).spec.vision.tile_size == 112


def test_absent_tiling_switches_are_off_as_in_the_class(opened: Write) -> None:
    keys = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square", "template")
    checkpoint = opened(config_overrides=dict.fromkeys(keys, ABSENT))
    vision = dataclasses.replace(tiny_spec().vision, dynamic_tiles=False, use_thumbnail=False, max_tiles=6)
    assert checkpoint.spec == dataclasses.replace(tiny_spec(), vision=vision)
    assert has_finding(checkpoint, "dynamic_image_size", "one tile")


@pytest.mark.parametrize("where", ["", "embedding_config."])
def test_normalisation_between_the_stacks_is_read_from_either_place(opened: Write, where: str) -> None:
    checkpoint = opened(config_overrides={"normalize_encoder_output": ABSENT, f"{where}normalize_encoder_output": True})
    assert checkpoint.spec.normalize_embedding


@pytest.mark.parametrize(
    ("architectures", "reported"),
    [("mmMambaChatModel", False), (["mmMambaChatModel"], False), (["LlamaForCausalLM"], True), (ABSENT, True)],
)
def test_architectures_may_be_a_string_or_a_list(opened: Write, architectures: Any, reported: bool) -> None:
    checkpoint = opened(config_overrides={"architectures": architectures})
    assert has_finding(checkpoint, "architecture") == reported


def test_another_template_is_reported(opened: Write) -> None:
    checkpoint = opened(config_overrides={"template": "phi3-chat"})
    assert checkpoint.spec.template == "phi3-chat"
    assert has_finding(checkpoint, "phi3-chat", "prompts will be refused")


# Tensors that may be missing, or there without being read.


def test_unread_tensors_and_rotary_buffers_may_be_absent_or_present(opened: Write) -> None:
    buffers = {"language_model.model.layers.0.attention.rotary_emb.inv_freq": np.zeros(8)}
    assert finding_free(opened(tiny_spec(kinds="teacher"), extra=buffers))
    checkpoint = opened(drop=[tensors.LLM_TABLE, tensors.CLASS_POSITION])
    assert checkpoint.spec == tiny_spec()
    assert finding_free(checkpoint)


def test_a_tied_head_is_the_token_table(opened: Write) -> None:
    checkpoint = opened(drop=[tensors.HEAD], config_overrides={"llm_config.tie_word_embeddings": True})
    assert checkpoint.head_name == tensors.LLM_TABLE
    assert checkpoint.tensor(checkpoint.head_name).shape == (512, 64)
    both = opened(config_overrides={"llm_config.tie_word_embeddings": True})
    assert both.head_name == tensors.HEAD
    assert has_finding(both, "tie_word_embeddings is true", "is stored and used")


def test_extra_rows_of_the_text_embedding_are_special_tokens(opened: Write) -> None:
    checkpoint = opened(tiny_spec(special_tokens=2))
    assert checkpoint.spec.special_tokens == 2
    unlabelled = opened(
        tiny_spec(special_tokens=2), config_overrides={"embedding_config": {"special_token_maps": ABSENT}}
    )
    assert unlabelled.spec.special_tokens == 2
    assert has_finding(unlabelled, "special_token_maps is empty", "2 rows")


def test_mixed_number_formats_are_reported_and_most_values_decide(opened: Write) -> None:
    small = {tensors.layer_prefix(tiny_spec(), i) + "attention.A_log_bias": "fp32" for i in range(4)}
    checkpoint = opened(dtype="fp16", dtypes=small, config_overrides={"torch_dtype": "float16"})
    assert checkpoint.dtype == "fp16"
    assert has_finding(checkpoint, "several number formats", "16 values in fp32")
    assert checkpoint.tensor(MAMBA_LAYER + "attention.A_log_bias").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_lossy_conversion_is_recognised_by_its_decays(opened: Write, dtype: Any, everywhere: bool) -> None:
    spec = tiny_spec()
    ones = {tensors.layer_prefix(spec, i) + "attention.A_log_bias": np.ones(4) for i in range(4)}
    if not everywhere:
        ones.popitem()
    assert has_finding(opened(spec, dtype=dtype, extra=ones), "A_log_bias is 1.0 in every") == everywhere


# Files.


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_spec(), shards=2, tokenizer=False)
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec == tiny_spec()
    assert has_finding(checkpoint, "no model.safetensors.index.json")


def test_a_single_file_wins_over_the_index_of_other_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_spec(), shards=2, tokenizer=False, seed=1)
    folder = write_checkpoint(tmp_path, tiny_spec(), tokenizer=False, seed=2)
    checkpoint = Checkpoint.open(folder)
    assert [path.name for path in checkpoint.files] == ["model.safetensors"]
    assert has_finding(checkpoint, "both present")


def test_tensors_that_the_index_forgot_are_read_and_reported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_spec(), shards=2, tokenizer=False)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][tensors.HEAD]
    path.write_text(json.dumps(index))
    checkpoint = Checkpoint.open(folder)
    assert tensors.HEAD in checkpoint.names()
    assert has_finding(checkpoint, "1 tensors are in the shards but not in", tensors.HEAD)


def test_the_hash_follows_content_alone(tmp_path: Path) -> None:
    first = Checkpoint.open(write_checkpoint(tmp_path / "a", tiny_spec(), shards=2))
    same = Checkpoint.open(write_checkpoint(tmp_path / "b", tiny_spec(), shards=2))
    other = Checkpoint.open(write_checkpoint(tmp_path / "c", tiny_spec(), shards=2, seed=1))
    assert first.sha256() == same.sha256() != other.sha256()
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text() + " ")
    assert same.sha256() != first.sha256()


def test_hashing_reports_every_byte(tmp_path: Path) -> None:
    from contextlib import contextmanager

    class Recorded:
        total: int | None = None
        done = 0

        @contextmanager
        def stage(self, title: str, total_bytes: int | None = None) -> Any:
            self.total = total_bytes
            yield self.advance

        def advance(self, step: int) -> None:
            self.done += step

    progress = Recorded()
    folder = write_checkpoint(tmp_path, tiny_spec(), tokenizer=False, shards=2)
    Checkpoint.open(folder).sha256(progress)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert progress.done == progress.total == weights + (folder / "config.json").stat().st_size
