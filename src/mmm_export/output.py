"""Outputs that are whole or absent: written beside their place under a temporary name, renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mmm_export import names
from mmm_export.errors import OutputError
from mmm_export.interrupts import signals_deferred

# Small files (manifest, graphs, tokenizer) are flushed to the disk before the rename. Weights are not: flushing 5 GB
# would dominate an export, and the manifest holds their hash, so a power cut that lost some of them is noticed on load.
FLUSHED_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MIB = 1 << 20
_GIB = 1 << 30
_YOUNG_SECONDS = 5.0


@contextmanager
def output_folder(
    target: Path,
    *,
    force: bool,
    needed_bytes: int = 0,
    marker: str = names.MANIFEST_FILE,
    protect: tuple[Path, ...] = (),
) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends, and vanishes if it raises.

    Ctrl-C and SIGTERM remove it too, and the parents made for it; what kill -9 leaves behind is removed by a later call
    for the same target.

    Args:
        target: the folder to write. An empty one may exist already.
        force: replace an existing folder, if it holds the file `marker`, so that no foreign folder is ever deleted.
        needed_bytes: refuse to begin when the file system has less than this free.
        marker: a file that every folder of this kind has.
        protect: folders that must not be replaced, such as the input of the work.

    Raises:
        OutputError: the target exists or appeared during the work, cannot be created, or the disk is full.
    """
    target = _resolved(target)
    _refuse_unless_replaceable(target, force=force, marker=marker, protect=protect)
    with _terminate_as_exception(), _parents_made(target):
        _remove_leftovers(target)
        _refuse_unless_free(target, needed_bytes)
        temporary = _temporary_name(target, "partial")
        lock = -1
        try:
            try:
                temporary.mkdir()
                lock = os.open(temporary, os.O_RDONLY)
                _lock(lock)
            except OSError as error:
                raise _cannot_write(target, error) from error
            with _disk_full_explained(target, needed_bytes):
                yield temporary
                _flush_small_files(temporary)
                with signals_deferred():
                    # Once more: somebody may have put a folder there during the work.
                    _refuse_unless_replaceable(target, force=force, marker=marker, protect=protect)
                    _swap_in(temporary, target, force=force)
        finally:
            with signals_deferred():
                shutil.rmtree(temporary, ignore_errors=True)
                if lock >= 0:
                    os.close(lock)


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """Like `output_folder` for one file: yield the path to write, which becomes `target` when the block ends.

    An existing file is replaced; a folder, a pipe or a device is not.
    """
    target = _resolved(target)
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} cannot be written", found="a folder or device of that name", wanted="a file name")
    with _terminate_as_exception(), _parents_made(target):
        _remove_leftovers(target)
        temporary = _temporary_name(target, "partial")
        lock = -1
        try:
            try:
                lock = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                _lock(lock)
            except OSError as error:
                raise _cannot_write(target, error) from error
            with _disk_full_explained(target, 0):
                yield temporary
                _flush(temporary)
                with signals_deferred():
                    temporary.replace(target)
                    _flush(target.parent)
        finally:
            with signals_deferred():
                with suppress(OSError):  # it may never have come to be: the error that tells why must not be hidden
                    temporary.unlink()
                if lock >= 0:
                    os.close(lock)


def _resolved(target: Path) -> Path:
    # A link is followed, so that the place it points to is written and the link stays. "." has no name to rename.
    return target.resolve() if target.is_symlink() or target.name in ("", "..") else target


def _refuse_unless_replaceable(target: Path, *, force: bool, marker: str, protect: tuple[Path, ...]) -> None:
    for kept in protect:
        place = kept.resolve()
        if target.resolve() in (place, *place.parents):
            raise OutputError(
                f"{target} cannot be replaced",
                found=f"it holds the input {kept}",
                wanted="an output apart from the input",
                hint="choose another output folder",
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} cannot be written", found="a file of that name", wanted="a folder name")
    content = sorted(path.name for path in target.iterdir())
    if not content:
        return
    if not force:
        raise OutputError(
            f"{target} exists",
            found=f"a folder with {len(content)} entries",
            wanted="a new or an empty folder",
            hint="choose another output folder, or replace this one with --force",
        )
    if marker not in content:
        raise OutputError(
            f"{target} will not be replaced",
            found=f"a folder without {marker}: {', '.join(content[:4])}{' ...' if len(content) > 4 else ''}",
            wanted=f"a folder with {marker}, as mmm-export writes it",
            hint="choose another output folder, or remove this one yourself",
        )


@contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """Make the missing parents of `target`; if the block raises, remove those of them that are empty."""
    missing: list[Path] = []
    try:
        try:
            missing.extend(folder for folder in target.parents if not folder.exists())
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _cannot_write(target: Path, error: OSError) -> OutputError:
    if error.errno in _FULL:
        return _disk_full(target, 0)
    return OutputError(
        f"{target} cannot be written",
        found=f"{error.strerror or error} in {target.parent}",
        wanted="a folder that you may write to",
        hint="choose another output, or change the permissions",
    )


def _refuse_unless_free(target: Path, needed_bytes: int) -> None:
    if needed_bytes and shutil.disk_usage(target.parent).free < needed_bytes:
        raise _disk_full(target, needed_bytes)


def _disk_full(target: Path, needed_bytes: int) -> OutputError:
    free = shutil.disk_usage(target.parent).free
    return OutputError(
        f"the disk is too full to write {target}",
        found=f"{_in_words(free)} free in {target.parent}",
        wanted=_in_words(needed_bytes) if needed_bytes > free else "more free space",
        hint="free some space or choose an output on another disk; nothing was left behind",
    )


def _in_words(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.2f} MiB"


@contextmanager
def _disk_full_explained(target: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            # Libraries in Rust and C++ wrap the system's error into their own class and keep only its words.
            if (isinstance(cause, OSError) and cause.errno in _FULL) or "No space left on device" in str(cause):
                raise _disk_full(target, needed_bytes) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _temporary_name(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_leftovers(target: Path) -> None:
    """Remove what dead processes left of earlier tries at the same target."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|previous)-(\d+)-[0-9a-f]{8}")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        pid = int(match[2])
        if match[1] == "partial" and (_is_young(path) or _is_in_use(path, pid)):
            continue
        # An old folder moved aside is not locked. Once the target is whole again nobody needs it, so a thread of this
        # process loses nothing; killed between the two renames of a replacement, it is the only whole copy.
        if match[1] == "previous" and ((pid != os.getpid() and _is_alive(pid)) or not _holds_files(target)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_young(path: Path) -> bool:
    # Between its making and its locking an output looks abandoned. Not even tried then: that would hold the lock.
    try:
        return time.time() - path.lstat().st_mtime < _YOUNG_SECONDS
    except OSError:
        return True


def _is_in_use(path: Path, pid: int) -> bool:
    """Ask the lock; where the file system has none, ask for the process."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return _is_alive(pid)
    finally:
        os.close(descriptor)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _lock(descriptor: int) -> None:
    """Lock a partial output until the descriptor closes: a process number says nothing in another container."""
    with suppress(OSError):  # some network file systems have no locks; then the process number alone decides
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _FULL or error.errno == errno.EIO:
            raise  # delayed allocation can meet a full disk only now
    finally:
        os.close(descriptor)


def _flush_small_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size <= FLUSHED_BYTES:
            _flush(path)
    _flush(folder)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _swap_in(temporary: Path, target: Path, *, force: bool) -> None:
    """Rename, with an old folder moved aside first; if the second rename fails, the old one comes back."""
    previous = _temporary_name(target, "previous")
    replaces = force and _holds_files(target)
    try:
        if replaces:
            target.rename(previous)
        try:
            temporary.rename(target)
        except OSError:
            if replaces:
                previous.rename(target)
            raise
    except OSError as error:
        raise _cannot_write(target, error) from error
    _flush(target.parent)
    if replaces:
        shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C, so that cleaning up happens; the exit code stays the usual 143."""
    handles = threading.current_thread() is threading.main_thread()
    if not handles or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        signal.signal(signal.SIGTERM, terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
