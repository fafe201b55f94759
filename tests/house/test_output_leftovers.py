"""What a killed process left beside its target goes; what another process still writes stays."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from mmm_export import output
from mmm_export.output import output_file, output_folder

WRITER = """
import sys, time
from pathlib import Path
from mmm_export.output import output_file, output_folder
write = output_file if sys.argv[2] == "file" else lambda target: output_folder(target, force=True)
with write(Path(sys.argv[1])):
    print("writing", flush=True)
    time.sleep(60)
"""

Open = Callable[[Path], AbstractContextManager[Path]]
KINDS: list[Open] = [output_file, partial(output_folder, force=True)]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def aged(path: Path) -> Path:
    """Make `path` a minute old, so that it no longer counts as just begun."""
    minute_ago = time.time() - 60
    os.utime(path, (minute_ago, minute_ago))
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(folder: Path, kind: str, pid: int) -> Path:
    path = folder / f".bundle.{kind}-{pid}-01234567"
    path.mkdir()
    (path / "manifest.json").write_text("left")
    return aged(path)


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks here")


def write_bundle(target: Path, text: str = "new") -> None:
    with output_folder(target, force=True) as folder:
        (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_leaves_no_target_and_a_later_run_removes_the_rest(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "output"
    command = [sys.executable, "-c", WRITER, str(target), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (rest,) = tmp_path.iterdir()
    assert rest != target
    aged(rest)
    with KINDS[kind == "folder"](target):
        pass
    assert listing(tmp_path) == ["output"]


def test_two_writers_of_one_target_do_not_remove_each_others_work(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with output_folder(target, force=True) as first:
        (first / "manifest.json").write_text("first")
        aged(first)
        write_bundle(target, "second")
        assert first.is_dir()
    assert (target / "manifest.json").read_text() == "first"
    assert listing(tmp_path) == ["bundle"]


@pytest.mark.parametrize("write", KINDS)
def test_work_of_another_container_is_kept_whatever_its_process_number_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Open
) -> None:
    monkeypatch.setattr(output, "_is_alive", lambda pid: False)
    with write(tmp_path / "output") as first:
        aged(first)
        with write(tmp_path / "output"):
            assert first.exists()


def test_a_leftover_with_our_own_process_number_goes(tmp_path: Path) -> None:
    leftover(tmp_path, "partial", os.getpid())  # in containers the tool has the same number every time
    write_bundle(tmp_path / "bundle")
    assert listing(tmp_path) == ["bundle"]


def test_an_output_made_but_not_yet_locked_is_kept(tmp_path: Path) -> None:
    young = leftover(tmp_path, "partial", dead_pid())
    os.utime(young)
    write_bundle(tmp_path / "bundle")
    assert young.is_dir()


def test_without_locks_the_process_number_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    dead, living = leftover(tmp_path, "partial", dead_pid()), leftover(tmp_path, "partial", os.getppid())
    write_bundle(tmp_path / "bundle")
    assert not dead.exists()
    assert living.is_dir()


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    link = tmp_path / f".bundle.partial-{dead_pid()}-01234567"
    link.symlink_to(tmp_path / "home")
    os.utime(link, (0, 0), follow_symlinks=False)
    write_bundle(tmp_path / "bundle")
    assert listing(tmp_path / "home") == ["thesis.tex"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("empty_target", [False, True])
def test_only_copy_is_kept_when_a_replacement_died_between_its_renames(
    tmp_path: Path, own: bool, empty_target: bool
) -> None:
    copy = leftover(tmp_path, "previous", os.getpid() if own else dead_pid())
    if empty_target:
        (tmp_path / "bundle").mkdir()
    with pytest.raises(ValueError, match="no"), output_folder(tmp_path / "bundle", force=True):
        raise ValueError("no")
    assert (copy / "manifest.json").read_text() == "left"


def test_an_old_folder_moved_aside_goes_once_the_target_is_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    own, dead = leftover(tmp_path, "previous", os.getpid()), leftover(tmp_path, "previous", dead_pid())
    living = leftover(tmp_path, "previous", os.getppid())  # may be in the middle of its replacement
    write_bundle(tmp_path / "bundle")
    assert [own.exists(), dead.exists(), living.exists()] == [False, False, True]


def test_an_output_stays_locked_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, locked = shutil.rmtree, []

    def remove(path: Path, ignore_errors: bool) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.append(path.name)
        finally:
            os.close(descriptor)
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(ValueError, match="no"), output_folder(tmp_path / "bundle", force=False):
        raise ValueError("no")
    assert len(locked) == 1
    assert listing(tmp_path) == []
