"""The oracle's reader of safetensors against the library's, and the test inventory against published counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle.tensors import Tensors
from oracle_checks.tiny_checkpoint import Sizes, random_tensors, shapes
from safetensors.torch import load_file, save_file

# Heads 0, 4, 8, ... of the 32 layers are attention in the released hybrid.
RELEASED = {
    "linear": (("mamba2",) * 8, ("mamba2",) * 24),
    "hybrid": ((("mha",) + ("mamba2",) * 3) * 2, (("mha",) + ("mamba2",) * 3) * 6),
    "teacher": (("mha",) * 8, ("mha",) * 24),
}


@pytest.mark.parametrize(
    ("kind", "tensors", "parameters"),
    [("linear", 396, 2_741_992_448), ("hybrid", 356, 2_708_076_288), ("teacher", 236, 2_606_327_808)],
)
def test_inventory_has_the_tensors_and_parameters_of_the_released_models(
    kind: str, tensors: int, parameters: int
) -> None:
    released = Sizes(RELEASED[kind], 2048, 16, 8, 128, 8192, 92553, patch=14, grid=32)
    found = shapes(released)
    assert len(found) == tensors
    assert sum(math.prod(shape) for shape in found.values()) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_value_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in random_tensors(Sizes(), 31).items()}
    tensors["edge"] = torch.tensor([0.0, -0.0, 1e-40, -6e-8, 65504.0, math.inf, -math.inf, 1 / 3]).to(dtype)
    tensors["one"] = torch.tensor(0.75).to(dtype)
    tensors["none"] = torch.zeros(0, 3, dtype=dtype)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = Tensors.open(tmp_path)
    wanted = load_file(path)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], value.double().numpy())
        assert found.shape(name) == tuple(value.shape)


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    tensors = random_tensors(Sizes(), 32)
    names = list(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file({name: torch.from_numpy(tensors[name]) for name in names[shard::3]}, tmp_path / file)
        weight_map.update(dict.fromkeys(names[shard::3], file))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    found = Tensors.open(tmp_path)
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name], tensors[name])


def test_a_prefix_selects_the_tensors_of_one_layer(tmp_path: Path) -> None:
    save_file(
        {name: torch.from_numpy(value) for name, value in random_tensors(Sizes(), 33).items()},
        tmp_path / "model.safetensors",
    )
    layer = Tensors.open(tmp_path).under("language_model.model.layers.1.").under("attention.")
    assert set(layer) == {
        "wvkqgdt.weight",
        "o_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log_bias",
        "g_norm_swish_gate.weight",
    }


def test_a_header_whose_sizes_disagree_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x in .*8 bytes do not hold shape \(3,\) of F32"):
        Tensors.open(tmp_path)
