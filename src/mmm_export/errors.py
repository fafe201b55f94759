"""Errors a user can cause, each told as: what went wrong, what was found, what was wanted, how to mend it."""

from __future__ import annotations


class MmmError(Exception):
    """A failure that the user can understand and mend; the command line prints it without a traceback and exits 1.

    Args:
        what: one sentence naming the file or value that is at fault.
        found: what is there.
        wanted: what should be there.
        hint: the next thing to try, ideally a command.
    """

    def __init__(
        self, what: str, *, found: str | None = None, wanted: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.found = found
        self.wanted = wanted
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.found is not None:
            lines.append(f"  found:  {self.found}")
        if self.wanted is not None:
            lines.append(f"  wanted: {self.wanted}")
        if self.hint is not None:
            lines.extend(["", f"hint: {self.hint}"])
        return "\n".join(lines)


class CheckpointError(MmmError):
    """A checkpoint folder cannot be read or does not describe an mmMamba model."""


class TokenizerError(MmmError):
    """The tokenizer files of a checkpoint or bundle are missing, damaged, or contradict each other."""


class BundleError(MmmError):
    """A bundle or engine folder is missing, damaged, of another version, or belongs to another model."""


class CalibrationError(MmmError):
    """Prompts to calibrate on, or a calibration, cannot be used: broken, of another bundle, or not finite."""


class PromptFileError(MmmError):
    """A file of prompts cannot be read, or a line of it is no prompt."""


class EngineError(MmmError):
    """An engine cannot be planned or built, or its folder is damaged or fits another device, version or bundle."""


class KernelError(MmmError):
    """A kernel library cannot be used, or refuses a call."""


class BuildError(MmmError):
    """Plugin libraries cannot be compiled: a tool, a header or a GPU is missing, or a compiler failed."""


class StateFileError(MmmError):
    """A saved state is damaged or belongs to another model."""


class ImageError(MmmError):
    """A file is no usable image."""


class BatchFullError(MmmError):
    """Every row of a batch is in use."""


class PromptError(MmmError):
    """A prompt cannot be run: empty, too long, or its image marks do not match the images."""


class OptionError(MmmError):
    """An option has a value that is not allowed."""


class OutputError(MmmError):
    """An output cannot be written: it exists, or the disk is full."""


class MissingPackageError(MmmError):
    """A feature needs a package or tool that is not installed."""
