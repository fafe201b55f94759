"""How the command line speaks: commands in the order of the flow, one form for every error, exit codes.

Exit codes: 0 done; 1 failed, or a check failed; 2 wrong usage; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from mmm_export.errors import MmmError, OptionError
from mmm_export.packages import missing_packages

PROGRAM = "mmm-export"
INTERRUPTED = 130


class FlowGroup(click.Group):
    """A group that lists its commands in the order they are used in, and knows the nearest name of a misspelt one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(self.commands)}"
            raise UsageError(f"no command {name!r}", hint, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            raise


class UsageError(click.UsageError):
    """Wrong usage with a hint."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def run(group: click.Group, arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; every failure is told on stderr in one form.

    Args:
        group: the commands; one that returns a number ends with it as the exit code.
        arguments: what follows the program's name.
    """
    _open_missing_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese shall not end an answer half-way
    try:
        result = group.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        return _usage_failure(error)
    except click.ClickException as error:
        return _failure(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return _failure("interrupted", INTERRUPTED)
    except MmmError as error:
        return _failure(str(error), 2 if isinstance(error, OptionError) else 1)
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _bug(error)
        _forget_stdout()
        return _failure("the disk is full\n\nhint: free some space, or send the output elsewhere", 1)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        return _bug(error) if name in ("", "mmm_export") else _failure(str(missing_packages([name])), 1)
    except Exception as error:
        return _bug(error)
    return result if isinstance(result, int) else 0


def _usage_failure(error: click.UsageError) -> int:
    path = error.ctx.command_path if error.ctx else PROGRAM
    message = error.format_message().rstrip(".")
    hint = getattr(error, "hint", None)
    if isinstance(error, click.NoSuchOption):
        message = f"no option {error.option_name}"
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
        hint = f"did you mean {near[0]}?" if near else None
        if error.option_name in ("--verbose", "--version"):
            hint = f"it goes before the command: {PROGRAM} {error.option_name} ..."
    see = "see" if not hint else f"{hint} See" if hint.endswith("?") else f"{hint}; see"
    return _failure(f"{message[:1].lower()}{message[1:]}\n\nhint: {see} {path} --help", 2)


def _failure(text: str, code: int) -> int:
    click.echo(f"error: {text}", err=True)
    return code


def _bug(error: Exception) -> int:
    return _failure(
        f"this is a defect of {PROGRAM}, not of your input\n  found:  {type(error).__name__}: {error}\n\n"
        f"hint: run it again as {PROGRAM} --verbose ... and report what it prints",
        1,
    )


def _open_missing_streams() -> None:
    """Give a program that was started with closed streams empty ones: Python has None in their place."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - open as long as the program runs
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def _forget_stdout() -> None:
    """Point stdout nowhere, so that Python's own flush at exit does not complain about the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
