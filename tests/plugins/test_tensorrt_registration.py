"""NVIDIA's own runtimes of TensorRT 10 and 11 load the one plugin library and make plugins of it, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorrt_tools import runtimes
from tensorrt_tools.building import plugin_library

from mmm_export.plugins.headers import KERNEL_LENS

_SCRIPT = Path(runtimes.__file__).with_name("lean_registration.py")


@pytest.mark.parametrize(("name", "version"), [("lean-10", "10.16.1"), ("lean-11", "11.4.0")])
def test_the_runtime_registers_the_library(name: str, version: str) -> None:
    done = runtimes.run_with_runtime(name, _SCRIPT, str(plugin_library()))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith(version)
    assert told["creator"] == ["MmmSelectiveScan", "1", ""]
    assert told["fields"] == ["heads", "kv_heads", "head_dim", "state_dim", "eps", "plugin_version"]
    assert told["builds"]
    assert told["runs"]


@pytest.mark.parametrize("name", ["lean-10", "lean-11"])
def test_wrong_fields_give_no_plugin_and_a_text(name: str) -> None:
    done = runtimes.run_with_runtime(name, _SCRIPT, str(plugin_library()))
    assert not json.loads(done.stdout)["takes_two_heads_entries"]
    assert "field heads is int32 with 2 entries; wanted int32 with 1" in done.stderr


def test_the_fetched_headers_are_those_that_the_build_names() -> None:
    assert runtimes.PACKAGES["headers"] == (KERNEL_LENS,)
