"""`mmm-export bench` times an engine and says what ran it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import install, write_engine

from mmm_export import names
from mmm_export.cli import cli
from mmm_export.command_line import run


def test_bench_of_an_engine_names_the_library_and_counts_the_plan(
    make_checkpoint: Callable[..., Path],
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch)
    manifest = write_engine(make_bundle(make_checkpoint("linear")), tmp_path / "engine")
    told = tmp_path / "bench.json"
    command = ["bench", str(tmp_path / "engine"), "--lengths", "20", "--new-tokens", "6", "--repeats", "1"]
    assert run(cli, [*command, "--bandwidth", "100", "--json", str(told)]) == 0, capsys.readouterr().err
    report = json.loads(told.read_text())
    assert report["backend"]["name"] == "tensorrt 10.3.0.30"
    assert report["model"]["model_sha256"] == manifest.bundle_sha256
    decode = next(row for row in report["rows"] if row["test"] == "decode")
    floor_ms = manifest.files[names.DECODER_PLAN].bytes / 100e9 * 1e3
    assert decode["roofline"] * decode["median_ms"] > floor_ms  # the plan and the states
