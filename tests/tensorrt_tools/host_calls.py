"""Calls of the mini host: arrays in, arrays and steps out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bundles.scan_node import EPS, Feeds, Sizes

from mmm_export.exporter.scan_function import OUTPUTS
from tensorrt_tools.building import mini_host, plugin_library

BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class HostRun:
    """What a run said and wrote; `outputs` is empty when it failed."""

    code: int
    steps: list[dict[str, Any]]
    stderr: str
    outputs: Feeds

    def step(self, name: str) -> dict[str, Any]:
        return next(step for step in self.steps if step["step"] == name)


def fields(sizes: Sizes, **changes: str) -> list[str]:
    """Options that give the attributes of a node; a change replaces, adds, or with "" leaves out one."""
    given = {name: f"int32:{getattr(sizes, name)}" for name in ("heads", "kv_heads", "head_dim", "state_dim")}
    given |= {"eps": f"float32:{EPS!r}", "plugin_version": "char:1", **changes}
    return [word for name, value in given.items() if value for word in ("--field", f"{name}={value}")]


def write_inputs(folder: Path, feeds: Feeds) -> None:
    """Write NAME.npy for every array; bfloat16 as its bits."""
    folder.mkdir(exist_ok=True)
    for name, array in feeds.items():
        np.save(folder / f"{name}.npy", array.view(np.uint16) if array.dtype.name == BFLOAT16 else array)


def run_host(folder: Path, feeds: Feeds, *options: str, program: Sequence[str | Path] = ()) -> HostRun:
    """Write `feeds` into `folder`/in, run the mini host on the plugin, and read what it writes.

    Args:
        folder: scratch.
        feeds: inputs by name.
        *options: of the mini host, such as `fields(sizes)`.
        program: another mini host and plugin than those of `plugin_folder`, with what runs them.
    """
    inputs, outputs = folder / "in", folder / "out"
    write_inputs(inputs, feeds)
    outputs.mkdir(exist_ok=True)
    flags = ["--bfloat16"] if any(a.dtype.name == BFLOAT16 for a in feeds.values()) else []
    program = program or (mini_host(), plugin_library())
    command = [*program, "--inputs", inputs, "--outputs", outputs, *flags, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    read: Feeds = {}
    if done.returncode == 0:
        like = {"y": "projected", "conv_state_out": "conv_state", "ssm_state_out": "ssm_state"}
        read = {name: np.load(outputs / f"{name}.npy").view(feeds[like[name]].dtype) for name in OUTPUTS}
    return HostRun(done.returncode, steps, done.stderr, read)
