"""The command: a table on stdout, JSON and a figure beside it, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.cli import cli
from mmm_export.command_line import run


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(make_checkpoint("hybrid"), max_tokens=96)


def test_a_bundle_is_timed_and_everything_is_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", str(bundle), "--lengths", "16,48", "--new-tokens", "4", "--kernels", "none", "--threads", "1"]
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg")]
    monkeypatch.setattr("sys.argv", ["/somewhere/mmm-export", *command, *files])
    assert run(cli, [*command, *files]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [re.sub(r"\s+", " ", line.split("|")[4]).strip() for line in lines[:6]] == [
        "test",
        "-" * 8,
        "pp16",
        "tg4 @ 16",
        "pp48",
        "tg4 @ 48",
    ]
    assert len({len(line) for line in lines[:6]}) == 1
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["kind"] == "bench"
    assert [(row["test"], row["tokens"]) for row in data["rows"]] == [
        ("prefill", 16),
        ("decode", 16),
        ("prefill", 48),
        ("decode", 48),
    ]
    assert all(row["median_ms"] > 0 and row["peak_bytes"] > 0 for row in data["rows"])
    assert all(row["roofline"] > 0 for row in data["rows"] if row["test"] == "decode")
    assert data["backend"] == {"name": "onnxruntime cpu", "kernels": None, "threads": 1}
    assert data["command"].startswith("mmm-export bench ")
    assert data["command"].endswith("bench.svg")
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")


def test_batches_are_timed_beside_one_another(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(bundle), "--lengths", "16", "--batch", "1,3", "--new-tokens", "4", "--kernels", "none"]
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg")]
    assert run(cli, [*command, "--threads", "1", "--bandwidth", "10", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[4:8]] for line in lines[:6] if "---" not in line]
    assert [row[:2] for row in cells] == [
        ["test", "batch"],
        ["pp16", "1"],
        ["tg4 @ 16", "1"],
        ["pp16", "3"],
        ["tg4 @ 16", "3"],
    ]
    assert cells[0][2:] == ["t/s each", "t/s"]
    each, together = (float(cell.replace(",", "")) for cell in cells[4][2:])
    assert together == pytest.approx(3 * each, abs=0.2)  # both are rounded to a tenth
    assert any("prompts (pp) are read one by one" in line for line in lines)
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in data["rows"]] == [1, 1, 3, 3]
    assert "decode step, 3 rows" in (tmp_path / "bench.svg").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lengths", "1Q"], "a prompt length cannot be read"),
        (["--batch", "1,0"], "a batch size cannot be read"),
        (["--lengths", "1K"], "does not fit into the KV cache"),
        (["--plot", "figure.txt"], "the figure has no known format"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bundle: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["bench", str(bundle), *more]) == 2
    assert said in capsys.readouterr().err
