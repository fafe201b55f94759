"""The TensorRT plugin MmmLinear through its whole life, without TensorRT."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles.linear_node import attributes_of, feeds_of
from bundles.linear_operands import BOUND, EPS, FORMATS, TYPES, Operands, draw
from oracle.compare import relative_l2
from tensorrt_tools.building import mini_host, plugin_library
from tensorrt_tools.host_calls import write_inputs

EPILOGUES = ("none", "residual", "silu")
SERIALIZED = [
    "weight_format=int32:2",
    "normalise=int32:1",
    "epilogue=int32:1",
    "float32_output=int32:0",
    "eps=float32:9.99999975e-06",
    "plugin_version=char:1",
]


def run(folder: Path, operands: Operands, *options: str, float32_output: bool = False, **changes: str) -> Any:
    """Run the mini host; returns the finished process, its steps, and the output or None."""
    write_inputs(folder / "in", feeds_of(operands))
    (folder / "out").mkdir(exist_ok=True)
    given = {name: f"int32:{value}" for name, value in attributes_of(operands, float32_output=float32_output).items()}
    given |= {"eps": f"float32:{EPS!r}", "plugin_version": "char:1", **changes}
    words = [word for name, value in given.items() for word in ("--field", f"{name}={value}")]
    if operands.x.dtype == TYPES["bf16"]:
        words.append("--bfloat16")
    command = [mini_host(), plugin_library(), "--operator", "MmmLinear", "--inputs", folder / "in", "--outputs"]
    done = subprocess.run(
        [*map(str, command), str(folder / "out"), *words, *options], capture_output=True, text=True, timeout=300
    )
    out = None
    if done.returncode == 0:
        out = np.load(folder / "out" / "out.npy")
        out = out if float32_output else out.view(operands.x.dtype)
    return done, [json.loads(line) for line in done.stdout.splitlines()], out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_outputs_are_those_of_float64(tmp_path: Path, dtype: str, weight_format: str, epilogue: str) -> None:
    operands = draw(3, 74, 384, weight_format, dtype).only(epilogue)
    done, _, out = run(tmp_path, operands)
    assert done.returncode == 0, done.stderr
    assert relative_l2(out, operands.oracle()) <= BOUND[dtype]


def test_logits_come_in_float32(tmp_path: Path) -> None:
    operands = draw(1, 1001, 256, "int4", "bf16", norm=False).only("none")
    done, _, out = run(tmp_path, operands, float32_output=True)
    assert done.returncode == 0, done.stderr
    assert out.dtype == np.float32
    assert relative_l2(out, operands.oracle()) <= BOUND["fp32"]


def test_engines_store_exactly_the_promised_fields(tmp_path: Path) -> None:
    operands = draw(2, 40, 256, "int4", "fp16")
    done, steps, _ = run(tmp_path, operands, "--serialize", str(tmp_path / "fields"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fields").read_text().splitlines() == SERIALIZED
    told = next(step for step in steps if step["step"] == "getCreators")
    assert (told["name"], told["version"], told["namespace"]) == ("MmmLinear", "1", "")
    assert told["fields"] == [text.partition("=")[0] for text in SERIALIZED]
    assert all(step["linear_only"] for step in steps if step["step"] == "supportsFormatCombination")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_format": "int32:3"}, "MmmLinear layer0: weight_format is 3; wanted 0 to 2"),
        ({"epilogue": "int32:-1"}, "epilogue is -1; wanted 0 to 2"),
        ({"normalise": "int32:2"}, "normalise is 2; wanted 0 to 1"),
        ({"eps": "float32:0"}, "eps is 0"),
        ({"eps": "float32:nan"}, "eps is nan"),
        ({"weight_format": "float32:1"}, "field weight_format is float32"),
        ({"plugin_version": "char:2"}, 'plugin_version is "2"'),
        ({"normalise": "int32:0"}, "5 inputs and 1 outputs; the fields call for 4 and 1"),
        ({"weight_format": "int32:1"}, "supportsFormatCombination refuses tensor 2"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused_in_words(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    done, _, _ = run(tmp_path, draw(2, 40, 256, "int4", "fp16"), **changes)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("x", (2, 128), "axis 1 of x is 128; wanted 256"),
        ("weight", (40, 2, 64), "weight"),
        ("scales", (40, 3), "axis 1 of scales is 3; wanted 2"),
        ("norm_weight", (255,), "axis 0 of norm_weight is 255; wanted 256"),
        ("residual", (3, 40), "axis 0 of residual is 3; wanted 2"),
    ],
)
def test_a_wrong_shape_is_named_with_what_was_wanted(
    tmp_path: Path, name: str, shape: tuple[int, ...], words: str
) -> None:
    operands = draw(2, 40, 256, "int4", "fp16")
    kinds = {"weight": np.dtype(np.uint8)}
    wrong = np.ones(shape, kinds.get(name, np.dtype(np.float16)))
    if name in ("weight", "scales"):
        operands = replace(operands, weight=operands.weight._replace(**{name: wrong}))
    else:
        operands = replace(operands, **{name: wrong})
    done, _, _ = run(tmp_path, operands)
    assert done.returncode == 1
    assert words in done.stderr


def test_an_unknown_operator_is_told(tmp_path: Path) -> None:
    command = [mini_host(), plugin_library(), "--inputs", tmp_path, "--outputs", tmp_path, "--operator", "MmmConv"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "option --operator has a wrong value" in done.stderr
    assert "MmmSelectiveScan or MmmLinear" in done.stderr
