"""What the command line says, whole: stdout, stderr and exit code, against stored snapshots.

UPDATE_SNAPSHOTS=1 writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import click
import pytest

from mmm_export import __version__
from mmm_export.cli import cli
from mmm_export.command_line import run

SNAPSHOTS = Path(__file__).parent / "snapshots"
CLICK = "8.5"  # help texts of other versions are laid out otherwise; constraints.txt pins this one

HELP = {f"help-{name}": [name, "--help"] for name in cli.commands} | {"help": ["--help"], "no-arguments": []}
HELP |= {f"help-plugins-{name}": ["plugins", name, "--help"] for name in ("build", "inspect")}
USAGE = {
    "version": ["--version"],
    "unknown-command": ["ispect"],
    "unknown-command-far": ["train"],
    "unknown-option": ["onnx", "ckpt", "-o", "bundle", "--dtyp", "fp16"],
    "verbose-after-command": ["doctor", "--verbose"],
    "missing-argument": ["onnx"],
    "missing-option": ["onnx", "checkpoint"],
    "bad-choice": ["onnx", "ckpt", "-o", "bundle", "--dtype", "int8"],
    "bad-number": ["run", "bundle", "--prompt", "x", "--max-new-tokens", "0"],
    "neither-prompt-nor-interactive": ["run", "bundle"],
}
INPUT = {
    "onnx-not-a-folder": ["onnx", "nowhere", "-o", "out"],
    "onnx-not-a-checkpoint": ["onnx", "empty", "-o", "out"],
    "verify-not-a-bundle": ["verify", "empty", "--checkpoint", "empty"],
    "run-not-a-bundle": ["run", "nowhere", "--prompt", "x"],
    "run-newer-bundle": ["run", "newer", "--prompt", "x"],
    "run-damaged-bundle": ["run", "damaged", "--prompt", "x"],
    "run-bad-option-value": ["run", "nowhere", "--prompt", "x", "--top-p", "1.5"],
    "inspect-nothing": ["inspect", "nowhere"],
    "inspect-other-folder": ["inspect", "empty"],
    "inspect-other-file": ["inspect", "note.txt"],
    "plugins-inspect-nothing": ["plugins", "inspect", "nowhere.so"],
    "plugins-inspect-other-file": ["plugins", "inspect", "note.txt"],
    "plugins-build-unknown-architecture": ["plugins", "build", "--cuda-arch", "hoper"],
    "plugins-build-old-architecture": ["plugins", "build", "--cuda-arch", "sm_75"],
    "plugins-build-unknown-target": ["plugins", "build", "--cuda-arch", "none", "--only", "tensorrt,triton"],
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with bad inputs the current one, and the terminal of a fixed width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("empty", "newer", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "newer" / "manifest.json").write_text('{"schema": 99, "kind": "bundle"}')
    (tmp_path / "damaged" / "manifest.json").write_text('{"schema": 1, "kind": "bun')
    (tmp_path / "note.txt").write_text("not a state file")
    return tmp_path


def compare_with_snapshot(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = run(cli, arguments)
    shown = capsys.readouterr()
    text = f"$ mmm-export {' '.join(arguments)}\n[exit code {code}]\n--- stdout\n{shown.out}--- stderr\n{shown.err}"
    text = text.replace(__version__, "VERSION")
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no snapshot {path.name}; UPDATE_SNAPSHOTS=1 writes it"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("workplace")
@pytest.mark.skipif(not metadata.version("click").startswith(CLICK), reason=f"snapshots are of click {CLICK}")
@pytest.mark.parametrize("name", [*HELP, *USAGE])
def test_help_and_usage_errors_read_as_stored(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    compare_with_snapshot(name, (HELP | USAGE)[name], capsys)


@pytest.mark.parametrize("name", INPUT)
def test_bad_input_reads_as_stored_and_leaves_nothing(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in workplace.iterdir())
    compare_with_snapshot(name, INPUT[name], capsys)
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_no_snapshot_is_left_over() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == {*HELP, *USAGE, *INPUT}


@pytest.mark.parametrize("name", [*USAGE, *INPUT])
def test_every_error_has_the_one_form(name: str) -> None:
    """`error: sentence`, then found and wanted indented, then a hint after an empty line; no traceback."""
    stderr = (SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8").partition("--- stderr\n")[2]
    if name == "version":
        assert stderr == ""
        return
    form = r"error: [^\n]+[^.\n]\n(  found:  [^\n]+\n)?(  wanted: [^\n]+\n)?(\nhint: [^\n]+\n)?"
    assert re.fullmatch(form, stderr), stderr


def test_every_option_has_help_and_every_command_an_example() -> None:
    for name, command in cli.commands.items():
        assert "Example" in (command.help or ""), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def failing(error: BaseException) -> click.Group:
    """Make a program with one command that raises."""

    @click.group()
    def program() -> None: ...

    @program.command()
    def fail() -> None:
        raise error

    return program


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(KeyboardInterrupt()), ["fail"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_a_missing_package_is_told_with_the_command_that_installs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(ModuleNotFoundError("No module named 'torch'", name="torch")), ["fail"]) == 1
    assert 'hint: pip install "mmm-export[export]"' in capsys.readouterr().err


def test_our_own_defect_is_told_apart_from_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(IndexError("tuple index")), ["fail"]) == 1
    shown = capsys.readouterr().err
    assert "a defect of mmm-export" in shown
    assert "IndexError: tuple index" in shown
    assert "Traceback" not in shown


def test_verbose_prints_the_traceback(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    assert run(cli, ["--verbose", "inspect", "nowhere"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["onnx", "verify"])
def test_export_commands_ask_for_missing_packages_before_they_begin(
    command: str, monkeypatch: pytest.MonkeyPatch, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Callable[[str], object] = lambda name: None if name in ("torch", "onnx") else object()  # noqa: E731
    monkeypatch.setattr("mmm_export.packages.find_spec", found)
    arguments = {"onnx": ["onnx", "empty", "-o", "out"], "verify": ["verify", "empty", "--checkpoint", "empty"]}
    assert run(cli, arguments[command]) == 1
    assert "this command needs torch, onnx" in capsys.readouterr().err


@pytest.mark.parametrize("redirection", [">&-", "<&-", "<&- >&-"])
def test_closed_streams_are_no_defect(redirection: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m mmm_export --help {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_told_as_such() -> None:
    command = f"{shlex.quote(sys.executable)} -m mmm_export --help > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full\n")
    assert "defect" not in done.stderr
