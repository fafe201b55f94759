"""What a run tells: a line on the terminal now and then, and every step to TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mmm_export.distillation.stage import StageName, StageOptions
from mmm_export.distillation.trainer import Record

QUIET_S = 2.0  # least time between two lines


class Journal:
    """Listener of a run.

    Args:
        say: prints a line.
        board: folder for TensorBoard, None for none.

    Attributes:
        last: last record of each stage.
    """

    def __init__(self, say: Callable[[str], None], board: Path | None = None) -> None:
        self._say = say
        self._board = board
        self._writer: Any = None
        self._steps = 0
        self._said = 0.0
        self.last: dict[str, Record] = {}

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def stage(self, name: StageName, options: StageOptions, done: int) -> None:
        """Announce a stage."""
        self._steps, self._said = options.steps, 0.0
        self._say(
            f"{name}: {options.steps} steps of {options.batch_samples} samples" + (f", {done} done" if done else "")
        )
        self._close()
        if self._board is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that a kill lost are removed from the curves.
            self._writer = SummaryWriter(str(self._board / name), purge_step=done + 1)

    def record(self, record: Record) -> None:
        """Note a step."""
        self.last[str(record["stage"])] = record
        if self._writer is not None:
            for name in ("loss", "gradient_norm", "learning_rate", "tokens_per_s", "worst_layer_loss"):
                if name in record:
                    self._writer.add_scalar(name, record[name], record["step"])
        now = time.monotonic()
        if "steps_per_s" in record and (now - self._said >= QUIET_S or record["step"] == self._steps):
            self._said = now
            self._say(step_line(record, self._steps))


def step_line(record: Record, steps: int) -> str:
    """Tell a step in a line."""
    left_s = (steps - float(record["step"])) / max(float(record["steps_per_s"]), 1e-9)
    parts = [
        f"  step {record['step']}/{steps}",
        f"loss {float(record['loss']):.4g}",
        f"gradient {float(record['gradient_norm']):.3g}",
        f"rate {float(record['learning_rate']):.3g}",
        f"{float(record['tokens_per_s']):,.0f} tokens/s",
        f"{in_words(left_s)} left",
    ]
    return "  ".join(parts)


def in_words(seconds: float) -> str:
    """Tell a time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} days {seconds % 86400 // 3600:.0f} h"
