"""`mmm-export calibrate` on a tiny bundle: what it writes and says, and what it refuses before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from calibration_data.bundles import write_prompts

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.manifest import read_manifest


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(make_checkpoint("hybrid"), max_tokens=256)


def test_one_calibration_serves_two_formats_and_an_analysis(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_prompts(tmp_path / "data", count=3))
    target = tmp_path / "int8"
    command = ["calibrate", str(bundle), "--data", data, "--format", "int8", "--samples", "3", "--threads", "1"]
    assert run(cli, [*command, "-o", str(target)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "warning: 3 samples are few" not in shown.err  # as many as were asked for
    assert "int8 for reference, smoothing auto" in shown.err
    calibration = tmp_path / "int8.calibration" / "calibration.json"
    again = ["calibrate", str(bundle), "--from", str(calibration)]
    options = ["--format", "int4", "--for", "onnxruntime", "--skip", "*.w2", "-o", str(tmp_path / "int4")]
    assert run(cli, [*again, *options]) == 0
    assert "left as they were: embedding_model.encoder.0.feed_forward.w2, " in capsys.readouterr().err
    assert read_manifest(tmp_path / "int4").quantization is not None
    report = tmp_path / "report.html"
    analysis = ["--data", data, "--format", "int8", "--samples", "1", "--analyze", "--json", "--report", str(report)]
    assert run(cli, [*again, *analysis]) == 0
    assert len(json.loads(capsys.readouterr().out)["costs"]) == 21
    assert "<svg" in report.read_text()
    assert run(cli, ["inspect", str(target)]) == 0
    assert "consumer             reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "int8", "-o", "out"], "--data is needed"),
        (["--format", "int8", "--data", "p.jsonl"], "-o is needed"),
        (["--format", "int8", "--data", "p.jsonl", "-o", "out", "--max-kl", "1"], "--max-kl goes with --analyze"),
        (["--format", "int8", "--data", "p", "--analyze", "--max-kl", "1", "--max-bytes", "1"], "give one"),
        (["--format", "int8", "--data", "p.jsonl", "-o", "out", "--smooth", "much"], "neither a number"),
        (["--data", "p.jsonl", "-o", "out"], "--format"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["calibrate", "bundle", *options]) == 2
    assert told in capsys.readouterr().err


def test_a_misspelt_name_is_told_before_anything_is_measured(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_prompts(tmp_path / "data", count=1))
    wrong = ["--format", "int8", "--skip", "language_model.outputs", "-o", str(tmp_path / "out")]
    assert run(cli, ["calibrate", str(bundle), "--data", data, *wrong]) == 2
    shown = capsys.readouterr().err
    assert "did you mean language_model.output?" in shown
    assert "measure layers" not in shown
    assert not (tmp_path / "out.calibration").exists()
