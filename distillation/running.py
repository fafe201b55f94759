"""What surrounds a run: the device, numeric settings of the process, and a Ctrl-C that ends it after a whole step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from mmm_export.distillation.recipe import RunOptions
from mmm_export.errors import OptionError


def chosen_device(name: str) -> str:
    """Turn "auto" into the device there is.

    Raises:
        OptionError: "cuda" without a GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no GPU", found="torch sees none", wanted="a CUDA device", hint="use --device cpu")
    return name


def numeric_settings(run: RunOptions) -> None:
    """Update torch's settings: TF32 in the scan where activations are bf16 anyway, and kernels that repeat their bits."""
    torch.set_float32_matmul_precision("highest" if run.dtype == "fp32" else "high")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second one interrupts at once, as always."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
