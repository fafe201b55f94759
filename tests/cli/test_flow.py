"""The commands on real folders: what goes to stdout, what to stderr, and which exit code says what."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.onnxruntime_support import best_body

STATISTICS = (
    r"\[\d+ prompt tokens( \(\d+ of images\))?, first token after [\d.]+ s, \d+ new tokens(, [\d.]+ tokens/s)?; .+\]\n"
)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("hybrid")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "bundle"
    command = ["onnx", str(checkpoint), "-o", str(folder), "--max-tokens", "1000", "--body", best_body()]
    assert run(cli, command) == 0
    return folder


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def ask(bundle: Path, *more: str) -> list[str]:
    return ["run", str(bundle), "--prompt", "What is it?", "--max-new-tokens", "4", *more]


def test_export_says_on_stderr_what_it_wrote_and_what_is_next(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["onnx", str(checkpoint), "-o", str(tmp_path / "bundle"), "--max-tokens", "100"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fp32, 4 layers" in shown.err
    assert "KV cache for 100 tokens: 1 of 4 layers are attention, so memory is not constant" in shown.err
    assert "next: mmm-export verify" in shown.err


def test_existing_output_is_refused_before_any_work(
    bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / "manifest.json").stat().st_mtime_ns
    assert run(cli, ["onnx", str(checkpoint), "-o", str(bundle)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {bundle} exists\n")
    assert "trace" not in shown
    assert (bundle / "manifest.json").stat().st_mtime_ns == before


def test_a_second_question_about_an_image_is_answered_from_the_state_cache(
    bundle: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ask(bundle, "--image", str(photograph))
    assert run(cli, command) == 0
    wanted = capsys.readouterr().out
    for said in ("prompt tokens (", "from the state cache"):
        assert run(cli, [*command, "--state-cache", str(tmp_path / "cache")]) == 0
        shown = capsys.readouterr()
        assert shown.out == wanted
        assert said in shown.err
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    assert run(cli, [*command, "--state-cache", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr()
    assert shown.out == wanted
    assert "warning: ignored " in shown.err


def test_force_does_not_replace_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert run(cli, ["onnx", str(checkpoint), "-o", str(copy), "--force"]) == 1
    assert "will not be replaced" in capsys.readouterr().err
    assert (copy / "config.json").is_file()


def test_verify_prints_a_verdict_and_writes_a_page_that_stands_alone(
    bundle: Path, checkpoint: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "parity.html"
    arguments = ["verify", str(bundle), "--checkpoint", str(checkpoint), "--image", str(photograph)]
    assert run(cli, [*arguments, "--new-tokens", "2", "--report", str(page)]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("verdict: PASSED\n")
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert re.findall(r'(?:src|href)="(?!#)', text) == []


def test_verify_of_another_checkpoint_fails(
    bundle: Path, make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["verify", str(bundle), "--checkpoint", str(make_checkpoint("hybrid", seed=1))]) == 1
    assert "error: the bundle was not made from this checkpoint" in capsys.readouterr().err


def test_answer_goes_to_stdout_and_statistics_to_stderr(
    bundle: Path, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ask(bundle, "--image", str(photograph))) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\n")
    assert len(shown.out) > 1
    assert re.fullmatch(STATISTICS, shown.err), shown.err
    assert "of images" in shown.err


def test_a_seed_repeats_an_answer(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert run(cli, ask(bundle, "--temperature", "2", "--seed", seed, "--max-new-tokens", "12")) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_prompt_can_come_from_a_pipe(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ask(bundle)) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?"))
    assert run(cli, ["run", str(bundle), "--prompt", "-", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == wanted


def test_a_saved_conversation_goes_on_in_another_process(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "talk.state")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAnd now?\n/quit\n"))
    assert run(cli, ["run", str(bundle), "--interactive", "--max-new-tokens", "4"]) == 0
    whole = capsys.readouterr().out
    assert run(cli, ask(bundle, "--save-state", state)) == 0
    first = capsys.readouterr().out
    again = ["run", str(bundle), "--prompt", "And now?", "--max-new-tokens", "4", "--load-state", state]
    assert run(cli, again) == 0
    assert first + capsys.readouterr().out == whole
    assert run(cli, ["inspect", state, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "state"


def test_a_piped_conversation_survives_mistakes_and_reports_them(
    bundle: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *("/image", "/image nowhere.png", f"/image {photograph}", "What is it?", "/save talk.state", "/reset"),
        *("/nonsense", "/load talk.state", "And now?", "/help", "/quit", "never read"),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run(cli, ["run", str(bundle), "--interactive", "--max-new-tokens", "2"]) == 1
    shown = capsys.readouterr()
    assert re.findall(r"error: (.+)", shown.err) == [
        "/image needs a file name",
        "no file nowhere.png",
        "no command /nonsense",
    ]
    assert len(re.findall(STATISTICS, shown.err)) == 2
    assert "of images" in shown.err
    assert (tmp_path / "talk.state").is_file()


def test_a_reader_that_leaves_early_is_no_error(bundle: Path) -> None:
    command = [sys.executable, "-m", "mmm_export", *ask(bundle, "--max-new-tokens", "200")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        shown = process.stderr.read()
    assert shown == ""


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_inspect_agrees_with_what_the_model_is(
    kind: str, checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {"checkpoint": checkpoint, "bundle": bundle}[kind]
    assert run(cli, ["inspect", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == kind
    assert data["layers"]["kinds"] == "0 mha, 1-3 mamba2"
    # 3 mamba2 layers of 4 heads x 16 x 16 float32; 128 conv channels; 2 kv heads x 16 for key and value.
    width = {"checkpoint": 2, "bundle": 4}[kind]  # bf16, fp32
    assert data["state"] == {
        "ssm_bytes": 3 * 4 * 16 * 16 * 4,
        "conv_bytes": 3 * 128 * width,
        "kv_bytes_per_token": 2 * 2 * 16 * width,
    }
    assert run(cli, ["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "0 mha, 1-3 mamba2" in shown
    for name, size in data["files"].items():
        assert (path / name).stat().st_size == size
        assert name in shown


def test_state_bytes_agree_with_the_session(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmm_export.runtime import Session

    assert run(cli, ["inspect", str(bundle), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)["state"]
    with Session.open(bundle) as session:
        assert session.state_bytes == state["ssm_bytes"] + state["conv_bytes"] + 1000 * state["kv_bytes_per_token"]


def test_doctor_names_what_is_there_and_how_to_get_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["doctor", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["Python"]["found"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "CPU" in found["onnxruntime"]["found"]
    assert {"torch", "nvcc", "cmake", "tensorrt", "tensorrt-rtx", "cuda-bindings", "NVIDIA driver"} <= set(found)
    assert all(row["hint"] for row in found.values() if row["found"] is None)
    assert all(row["purpose"] for row in found.values())
    assert run(cli, ["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_verify_prints_its_table_even_when_the_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmm_export.exporter import report, verify

    monkeypatch.setattr(verify, "verify_bundle", lambda *_, **__: report)
    monkeypatch.setattr(report, "table_rows", lambda _: [["hop", *["cell"] * len(report.COLUMNS)]])
    monkeypatch.setattr(report, "verdict_lines", lambda _: ["verdict: PASSED"])
    monkeypatch.setattr(report, "html_report", lambda _: "page")
    (tmp_path / "file").write_text("")
    command = ["verify", "bundle", "--checkpoint", "checkpoint", "--report", str(tmp_path / "file" / "page.html")]
    assert run(cli, command) == 1
    shown = capsys.readouterr()
    assert shown.out.endswith("verdict: PASSED\n")
    assert shown.err.startswith("error: ")
