"""The TensorRT plugin through its whole life, without TensorRT: numbers of the oracle, and every wrong call told in words."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles.scan_node import TYPES, Feeds, Sizes, draw, wanted
from oracle.compare import relative_l2
from tensorrt_tools.building import mini_host, plugin_library
from tensorrt_tools.host_calls import HostRun, fields, run_host

from mmm_export.exporter.scan_function import INPUTS, OUTPUTS

# y is computed in float32 and rounded once: half a unit in the last place, 2**-(p+1) for a mantissa of p bits, is the most
# that one element can be off, and so the whole vector. float32 sums some hundred products instead: 1e-6 is 16 units.
Y_BOUND = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}
STATE_BOUND = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}  # of the state's own type, for the same reason

SMALL = Sizes()
ODD = Sizes(heads=6, kv_heads=2, head_dim=48, state_dim=32, conv_width=4)

# The promise to engines that exist: names, types and order may grow at the end, never change.
SERIALIZED = [
    "heads=int32:4",
    "kv_heads=int32:2",
    "head_dim=int32:16",
    "state_dim=int32:16",
    "eps=float32:9.99999975e-06",
    "plugin_version=char:1",
]


def assert_right(run: HostRun, sizes: Sizes, feeds: Feeds, dtype: str, state: str = "fp32") -> None:
    assert run.code == 0, run.stderr
    right = wanted(sizes, feeds)
    assert relative_l2(run.outputs["y"], right["y"]) <= Y_BOUND[dtype]
    assert relative_l2(run.outputs["ssm_state_out"], right["ssm_state_out"]) <= STATE_BOUND[state]
    assert np.array_equal(
        run.outputs["conv_state_out"].astype(np.float64), right["conv_state_out"]
    )  # inputs, passed on


def refused(run: HostRun, *words: str) -> None:
    """Whether the run failed in words, and with no crash."""
    assert run.code == 1, (run.code, run.stderr)
    assert run.stderr.splitlines()[-1].strip()
    for word in words:
        assert word in run.stderr


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65, 130])
def test_outputs_are_those_of_float64(tmp_path: Path, dtype: str, tokens: int) -> None:
    feeds = draw(SMALL, [tokens], tokens, dtype)
    assert_right(run_host(tmp_path, feeds, *fields(SMALL)), SMALL, feeds, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[7, 7], [0, 7, 3], []], ids=["full", "ragged", "no-rows"])
def test_padding_of_a_batch_touches_no_state(tmp_path: Path, dtype: str, lengths: list[int]) -> None:
    feeds = draw(ODD, lengths, 7, dtype)
    assert_right(run_host(tmp_path, feeds, *fields(ODD)), ODD, feeds, dtype)


@pytest.mark.parametrize("state", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_short_state_is_read_and_rounded_once(tmp_path: Path, dtype: str, state: str) -> None:
    feeds = draw(SMALL, [5, 3], 5, dtype)
    feeds["ssm_state"] = feeds["ssm_state"].astype(TYPES[state])
    run = run_host(tmp_path, feeds, *fields(SMALL))
    assert run.outputs["ssm_state_out"].dtype == TYPES[state]
    assert_right(run, SMALL, feeds, dtype, state)


@pytest.mark.parametrize("tokens", [1, 65])
def test_a_state_in_place_gives_the_same_bits(tmp_path: Path, tokens: int) -> None:
    feeds = draw(SMALL, [tokens, 1], tokens, "fp16")
    apart = run_host(tmp_path, feeds, *fields(SMALL))
    placed = run_host(tmp_path, feeds, *fields(SMALL), "--in-place-state")
    assert all(np.array_equal(apart.outputs[n].view(np.uint8), placed.outputs[n].view(np.uint8)) for n in OUTPUTS)


@pytest.mark.parametrize("in_place", [(), ("--in-place-state",)], ids=["swapped", "in-place"])
def test_a_split_prefill_and_decode_steps_equal_one_call(tmp_path: Path, in_place: tuple[str, ...]) -> None:
    feeds = draw(SMALL, [70, 66], 70)
    run = run_host(tmp_path, feeds, *fields(SMALL), "--split", "64,0,4,1,1", *in_place)
    assert_right(run, SMALL, feeds, "fp32")
    assert [s["tokens"] for s in run.steps if s["step"] == "onShapeChange"] == [70, 64, 0, 4, 1, 1]


def test_repeats_carry_the_states(tmp_path: Path) -> None:
    once = draw(SMALL, [4], 4)
    thrice = {**once, "projected": np.tile(once["projected"], (1, 3, 1)), "lengths": np.array([12], np.int32)}
    run = run_host(tmp_path, once, *fields(SMALL), "--repeat", "3")
    right = wanted(SMALL, thrice)
    assert relative_l2(run.outputs["y"], right["y"][:, -4:]) <= Y_BOUND["fp32"]
    assert relative_l2(run.outputs["ssm_state_out"], right["ssm_state_out"]) <= STATE_BOUND["fp32"]


def test_a_plugin_built_for_long_prompts_serves_a_short_one(tmp_path: Path) -> None:
    feeds = draw(SMALL, [3], 3)
    run = run_host(tmp_path, feeds, *fields(SMALL), "--profile-max", "8192,4")
    assert_right(run, SMALL, feeds, "fp32")
    assert run.step("configurePlugin") == {"step": "configurePlugin", "max_batch": 4, "max_tokens": 8192}


def test_engines_store_exactly_the_promised_fields(tmp_path: Path) -> None:
    run = run_host(tmp_path, draw(SMALL, [2], 2), *fields(SMALL), "--serialize", str(tmp_path / "fields"))
    assert run.step("getFieldsToSerialize")["fields"] == SERIALIZED
    assert (tmp_path / "fields").read_text().splitlines() == SERIALIZED
    assert run.step("getCreators")["fields"] == [text.partition("=")[0] for text in SERIALIZED]


def test_a_plugin_loaded_from_stored_fields_computes_the_same(tmp_path: Path) -> None:
    (tmp_path / "fields").write_text("\n".join(SERIALIZED) + "\n")
    feeds = draw(SMALL, [5], 5)
    run = run_host(tmp_path, feeds, "--fields", str(tmp_path / "fields"), "--deserialize", str(tmp_path / "fields"))
    assert_right(run, SMALL, feeds, "fp32")


def test_name_version_and_namespace_are_those_that_parsers_look_for(tmp_path: Path) -> None:
    step = run_host(tmp_path, draw(SMALL, [1], 1), *fields(SMALL)).step("getCreators")
    assert (step["name"], step["version"], step["namespace"]) == ("MmmSelectiveScan", "1", "")
    assert step["interface"] == "PLUGIN CREATOR_V3ONE"


def test_unknown_fields_are_ignored_and_missing_ones_have_the_released_models_values(tmp_path: Path) -> None:
    released = Sizes(heads=16, kv_heads=8, head_dim=128, state_dim=128)
    feeds = draw(released, [1], 1)
    assert_right(run_host(tmp_path, feeds, "--field", "from_the_future=int32:7"), released, feeds, "fp32")


def test_every_tensor_takes_its_types_in_linear_format_only(tmp_path: Path) -> None:
    run = run_host(tmp_path, draw(SMALL, [1], 1, "fp16"), *fields(SMALL))
    steps = [step for step in run.steps if step["step"] == "supportsFormatCombination"]
    floats = ["float32", "float16", "bfloat16"]
    assert [step["tensor"] for step in steps] == [*INPUTS, *OUTPUTS]
    assert all(step["linear_only"] for step in steps)
    assert [step["types"] for step in steps] == [
        *(floats, ["int32"], ["float16"], floats),
        *([["float32"]] * 5),
        *(["float16"], ["float16"], ["float32"]),
    ]


@pytest.mark.parametrize("name", INPUTS)
def test_a_wrong_shape_is_named_with_what_was_wanted(tmp_path: Path, name: str) -> None:
    feeds = draw(SMALL, [3, 3], 3)
    # The last size of conv_weight says how wide the convolution is, and so cannot be wrong by itself.
    feeds[name] = np.repeat(feeds[name], 2, axis=0 if name == "conv_weight" else -1)
    refused(run_host(tmp_path, feeds, *fields(SMALL)), f"{name} is (", "wanted (")


@pytest.mark.parametrize("name", ["lengths", "conv_state", "ssm_state"])
def test_another_batch_is_refused_before_it_runs(tmp_path: Path, name: str) -> None:
    feeds = draw(SMALL, [3, 3], 3)
    feeds[name] = np.concatenate([feeds[name]] * 2)
    refused(run_host(tmp_path, feeds, *fields(SMALL)), "onShapeChange returned 1", f"{name} is (4", "wanted (2")


@pytest.mark.parametrize("name", INPUTS)
def test_a_wrong_rank_is_refused(tmp_path: Path, name: str) -> None:
    feeds = draw(SMALL, [3], 3)
    feeds[name] = feeds[name][..., None]
    refused(run_host(tmp_path, feeds, *fields(SMALL)), name)


@pytest.mark.parametrize("name", [name for name in INPUTS if name not in ("projected", "ssm_state")])
def test_a_wrong_type_is_named_with_what_was_wanted(tmp_path: Path, name: str) -> None:
    feeds = draw(SMALL, [3], 3)
    feeds[name] = feeds[name].astype(np.float16)
    right = "int32" if name == "lengths" else "float32"
    refused(run_host(tmp_path, feeds, *fields(SMALL)), f"refuses {name}", "found:  float16", f"wanted: {right}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": "float32:4"}, ("field heads is float32", "wanted int32")),
        ({"heads": "int64:4"}, ("field heads is int64", "wanted int32")),
        ({"heads": "int32:4,4"}, ("field heads", "2 entries")),
        ({"eps": "float64:1e-5"}, ("field eps is float64", "wanted float32")),
        ({"eps": "float32:0"}, ("eps is 0",)),
        ({"eps": "float32:nan"}, ("eps is nan",)),
        ({"plugin_version": "char:2"}, ('plugin_version is "2"', 'knows "1"')),
        ({"plugin_version": "char:"}, ('plugin_version is ""',)),
        ({"plugin_version": "int32:1"}, ("field plugin_version is int32", "wanted char")),
        ({"heads": "int32:0"}, ("heads is 0",)),
        ({"heads": "int32:-4"}, ("heads is -4",)),
        ({"heads": "int32:2147483647", "kv_heads": "int32:1"}, ("heads 2147483647",)),
        ({"heads": "int32:5"}, ("heads is 5", "multiple of kv_heads")),
        ({"kv_heads": "int32:0"}, ("kv_heads is 0",)),
        ({"head_dim": "int32:24"}, ("head_dim 24", "16, 32")),
        ({"state_dim": "int32:144"}, ("state_dim 144", "128")),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_field_gives_no_plugin(tmp_path: Path, changes: dict[str, str], words: tuple[str, ...]) -> None:
    run = run_host(tmp_path, draw(SMALL, [1], 1), *fields(SMALL, **changes))
    refused(run, "createPlugin BUILD gave no plugin", "MmmSelectiveScan layer0: ", *words)


def test_fields_of_another_model_are_refused_when_it_runs(tmp_path: Path) -> None:
    (tmp_path / "fields").write_text("\n".join(SERIALIZED).replace("=int32:4", "=int32:8"))
    run = run_host(tmp_path, draw(SMALL, [1], 1), *fields(SMALL), "--deserialize", str(tmp_path / "fields"))
    refused(run, "onShapeChange returned 1", "projected is (1, 1, 196); wanted (1, 1, 328)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--profile-max", "2,1"), ("larger than --profile-max", "3 tokens, batch 1", "at most 2 tokens, batch 1")),
        (("--split", "1,1"), ("--split does not add up", "2 tokens", "3")),
        (("--profile-max", "4"), ("--profile-max",)),
        (("--repeat", "0"), ("--repeat", "at least 1")),
        (("--device", "tpu"), ("--device", "cpu or cuda")),
        (("--color",), ("unknown option --color",)),
        (("--field", "heads"), ("NAME=TYPE:VALUE",)),
        (("--field", "heads=int8:4"), ("int32, int64",)),
        (("--field", "heads=int32:four"), ("'four'",)),
        (("--graph", "--time", "1"), ("--graph needs a CUDA device",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_told(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run_host(tmp_path, draw(SMALL, [3], 3), *fields(SMALL), *options), *words)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    feeds = draw(SMALL, [3], 3)
    del feeds["A_log"]
    refused(run_host(tmp_path, feeds, *fields(SMALL)), "cannot open", "A_log.npy")


def test_a_call_is_timed(tmp_path: Path) -> None:
    run = run_host(tmp_path, draw(SMALL, [3], 3), *fields(SMALL), "--time", "5")
    assert run.step("time")["microseconds"] > 0


def test_the_help_names_every_option() -> None:
    said = subprocess.run([mini_host(), "--help"], capture_output=True, text=True, check=True).stdout
    source = (Path(__file__).parents[2] / "plugins" / "host" / "options.cpp").read_text()
    options = {word.split('"')[0] for word in source.split('option == "')[1:]}
    assert options
    assert all(option in said for option in options - {"--help"})


def symbols(*flags: str) -> list[Any]:
    said = subprocess.run(["nm", "-D", *flags, plugin_library()], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in said.splitlines()]


def test_the_library_exports_two_functions_and_nothing_else() -> None:
    assert sorted(symbols("--defined-only")) == ["getCreators", "setLoggerFinder"]


def test_the_library_needs_no_symbol_and_no_library_of_tensorrt() -> None:
    foreign = ("nvinfer", "getPluginRegistry", "getLogger", "_INTERNAL", "getInferLib")
    assert not [name for name in symbols("--undefined-only") if any(word in name for word in foreign)]
    said = subprocess.run(["readelf", "-d", plugin_library()], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].split("]")[0] for line in said.splitlines() if "NEEDED" in line]
    assert {name.split(".")[0] for name in needed} <= {
        "libc",
        "libm",
        "libdl",
        "librt",
        "libpthread",
        "ld-linux-x86-64",
    }
