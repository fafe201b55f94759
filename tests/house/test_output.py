"""Outputs are whole or absent, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.errors import OutputError
from mmm_export.output import output_file, output_folder

WRITER = """
import sys, time
from pathlib import Path
from mmm_export.output import output_folder
with output_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "manifest.json").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bundle(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def write_then_fail(target: Path, error: BaseException) -> None:
    with output_folder(target, force=True) as folder:
        (folder / "manifest.json").write_text("half")
        raise error


def write_file_then_fail(target: Path, error: BaseException) -> None:
    with output_file(target) as path:
        path.write_text("half")
        raise error


def interrupted_writer(target: Path, number: int) -> int:
    """Start a process that writes `target`, signal it in the middle, and return its exit code."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
    return process.returncode


def test_target_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with output_folder(target, force=False) as folder:
        (folder / "manifest.json").write_text("{}")
        assert folder.parent == target.parent  # a rename must not cross file systems
        assert not target.exists()
    assert listing(tmp_path / "new") == ["bundle"]
    assert listing(target) == ["manifest.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_then_fail(tmp_path / "bundle", error)
    assert listing(tmp_path) == []


def test_existing_folder_is_refused_without_force_and_kept(tmp_path: Path) -> None:
    target = bundle(tmp_path / "bundle", "old")
    with pytest.raises(OutputError, match="bundle exists") as caught, output_folder(target, force=False):
        pytest.fail("must not begin")
    assert "--force" in str(caught.value)
    assert (target / "manifest.json").read_text() == "old"


def test_an_empty_folder_may_be_written_without_force(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with output_folder(tmp_path / "bundle", force=False) as folder:
        (folder / "manifest.json").write_text("new")
    assert listing(tmp_path / "bundle") == ["manifest.json"]


def test_force_replaces_a_bundle_and_keeps_it_when_the_work_fails(tmp_path: Path) -> None:
    target = bundle(tmp_path / "bundle", "old")
    with pytest.raises(ValueError, match="no"):
        write_then_fail(target, ValueError("no"))
    assert (target / "manifest.json").read_text() == "old"
    with output_folder(target, force=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (target / "manifest.json").read_text() == "new"
    assert listing(tmp_path) == ["bundle"]


def test_force_never_deletes_a_foreign_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="will not be replaced") as caught, output_folder(home, force=True):
        pytest.fail("must not begin")
    assert "thesis.tex" in str(caught.value)
    assert listing(home) == ["thesis.tex"]


@pytest.mark.parametrize("place", ["input", "."])
def test_the_input_and_its_parents_are_never_replaced(tmp_path: Path, place: str) -> None:
    kept = bundle(tmp_path / "input", "kept")
    (tmp_path / "manifest.json").write_text("{}")
    with (
        pytest.raises(OutputError, match="cannot be replaced"),
        output_folder(tmp_path / place, force=True, protect=(kept,)),
    ):
        pytest.fail("must not begin")
    assert (kept / "manifest.json").read_text() == "kept"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    target = bundle(tmp_path / "disk" / "bundle", "old")
    (tmp_path / "link").symlink_to(target)
    with output_folder(tmp_path / "link", force=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (target / "manifest.json").read_text() == "new"


@pytest.mark.parametrize(("force", "message"), [(False, "exists"), (True, "will not be replaced")])
def test_a_folder_that_appears_during_the_work_is_kept(tmp_path: Path, force: bool, message: str) -> None:
    target = tmp_path / "bundle"

    def write() -> None:
        with output_folder(target, force=force):
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputError, match=message):
        write()
    assert listing(tmp_path) == ["bundle"]
    assert listing(target) == ["thesis.tex"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_file_replaces_neither_pipe_nor_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "report"
    make(target)
    mode = target.stat().st_mode
    with pytest.raises(OutputError, match="folder or device"), output_file(target):
        pytest.fail("must not begin")
    assert target.stat().st_mode == mode


@pytest.mark.parametrize("write", [write_then_fail, write_file_then_fail])
def test_a_failure_removes_the_parents_it_made_and_no_other(
    tmp_path: Path, write: Callable[[Path, BaseException], None]
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="no"):
        write(tmp_path / "mine" / "new" / "newer" / "output", ValueError("no"))
    assert listing(tmp_path) == ["mine"]
    assert listing(tmp_path / "mine") == []


def test_a_failure_keeps_a_parent_that_others_use_by_now(tmp_path: Path) -> None:
    def write() -> None:
        with output_file(tmp_path / "new" / "state"):
            (tmp_path / "new" / "theirs").write_text("")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write()
    assert listing(tmp_path / "new") == ["theirs"]


def test_small_amounts_of_space_are_told_in_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(1 << 40, 1 << 40, 3 << 19)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(OutputError) as caught,
        output_folder(tmp_path / "bundle", force=False, needed_bytes=5 << 20),
    ):
        pytest.fail("must not begin")
    assert "1.50 MiB free" in str(caught.value)
    assert "5.00 MiB" in str(caught.value)


def test_too_little_space_is_refused_before_the_work_begins(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="too full") as caught,
        output_folder(tmp_path / "bundle", force=False, needed_bytes=1 << 60),
    ):
        pytest.fail("must not begin")
    assert "GiB free" in str(caught.value)
    assert "1073741824.00 GiB" in str(caught.value)
    assert listing(tmp_path) == []


def write_to_full_disk() -> None:
    with Path("/dev/full").open("w") as stream:
        stream.write("x")


def wrap_full_disk() -> None:
    try:
        write_to_full_disk()
    except OSError as error:
        raise RuntimeError("serialisation failed") from error


def speak_of_full_disk() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")  # as libraries in Rust say it


@pytest.mark.parametrize("fail", [write_to_full_disk, wrap_full_disk, speak_of_full_disk])
def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path: Path, fail: Callable[[], None]) -> None:
    with pytest.raises(OutputError, match="too full"), output_folder(tmp_path / "bundle", force=False):
        fail()
    with pytest.raises(OutputError, match="too full"), output_file(tmp_path / "state"):
        fail()
    assert listing(tmp_path) == []


def test_other_failures_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bad") as caught, output_folder(tmp_path / "bundle", force=False):
        raise OSError(errno.EIO, "bad disk")
    assert not isinstance(caught.value, OutputError)


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "file" / "b", force=False):
        pytest.fail("must not begin")
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "file", force=True):
        pytest.fail("must not begin")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "locked" / "b", force=False):
        pytest.fail("must not begin")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_terminate_and_ctrl_c_leave_nothing(tmp_path: Path, number: int, code: int | None) -> None:
    found = interrupted_writer(tmp_path / "bundle", number)
    assert found != 0
    assert code is None or found == code
    assert listing(tmp_path) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "talk.state"
    target.write_text("old")
    with pytest.raises(ValueError, match="no"):
        write_file_then_fail(target, ValueError("no"))
    assert target.read_text() == "old"
    with output_file(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["talk.state"]


def test_a_file_gets_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with output_file(tmp_path / "state") as path:
        path.write_text("x")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_works_in_a_thread_and_leaves_signal_handlers_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def write() -> None:
        with output_folder(tmp_path / "thread", force=False) as folder:
            (folder / "manifest.json").write_text("{}")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    with output_folder(tmp_path / "main", force=False) as folder:
        (folder / "manifest.json").write_text("{}")
    assert listing(tmp_path) == ["main", "thread"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_while_handlers_change_leaves_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is played by the call that changes the handler: it changes it, then raises as a handler would."""
    real = signal.signal
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for struck in before:
        pending: list[int] = [struck]

        def strike(number: int, handler: signal.Handlers, pending: list[int] = pending) -> object:
            previous = real(number, handler)
            if number in pending:
                pending.clear()
                raise SystemExit(143)
            return previous

        monkeypatch.setattr(signal, "signal", strike)
        with pytest.raises(SystemExit), output_folder(tmp_path / "bundle", force=True) as folder:
            (folder / "manifest.json").write_text("{}")
        monkeypatch.setattr(signal, "signal", real)
        after = {number: signal.getsignal(number) for number in before}
        for number, handler in before.items():
            real(number, handler)  # for the tests after this one
        assert after == before
        assert listing(tmp_path) == []


def test_a_handler_that_python_did_not_install_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, changed = signal.signal, []

    def changing(number: int, handler: signal.Handlers) -> object:
        changed.append(number)
        previous = real(number, handler)
        return None if number == signal.SIGTERM else previous

    find = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else find(number))
    monkeypatch.setattr(signal, "signal", changing)
    before = find(signal.SIGTERM)
    try:
        with output_folder(tmp_path / "bundle", force=False) as folder:
            (folder / "manifest.json").write_text("{}")
    finally:
        real(signal.SIGTERM, before)
    assert listing(tmp_path) == ["bundle"]
    assert signal.SIGTERM not in changed


def test_a_read_only_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match="cannot be written"), output_file(tmp_path / "file"):
        pass
