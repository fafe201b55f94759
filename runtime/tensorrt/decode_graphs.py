"""When a decode step is recorded into a CUDA graph, and when it runs without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from mmm_export.errors import MmmError
from mmm_export.runtime.tensorrt.cuda import CudaDevice

Stage = Literal["cold", "warm", "recorded", "plain"]


class DecodeGraphs:
    """Two graphs of the same step, one for each side of the states that swap, since a graph keeps the addresses it was recorded with.

    The first step of a side runs plainly: TensorRT defers work to the first run, which cannot be recorded. The second is recorded and
    launched, and so are all after it. Where recording fails, that side runs plainly for ever; `reason` tells why.
    """

    def __init__(self, device: CudaDevice, *, enabled: bool = True) -> None:
        self._device = device
        self._stages: list[Stage] = ["cold", "cold"] if enabled else ["plain", "plain"]
        self._graphs: list[Any] = [None, None]
        self.reason: str | None = None if enabled else "not wanted"

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """What each side does at its next step."""
        return self._stages[0], self._stages[1]

    def run(self, side: int, enqueue: Callable[[], None], is_capturable: Callable[[], bool]) -> None:
        """Enqueue one step of a side.

        Args:
            side: that the step reads.
            enqueue: enqueues everything of the step; called once plainly, once to be recorded.
            is_capturable: asked once, just before recording.

        Raises what `enqueue` and the launch raise.
        """
        if self._stages[side] == "warm":
            self._record(side, enqueue, is_capturable)
        if self._stages[side] == "recorded":
            self._device.launch(self._graphs[side])
            return
        enqueue()
        if self._stages[side] == "cold":
            self._stages[side] = "warm"

    def _record(self, side: int, enqueue: Callable[[], None], is_capturable: Callable[[], bool]) -> None:
        self._stages[side] = "plain"
        if not is_capturable():
            self.reason = "the library says that this engine cannot be recorded"
            return
        try:
            self._graphs[side] = self._device.capture(enqueue)
        except MmmError as error:
            self.reason = f"recording failed: {error.found or error.what}"
            return
        self._stages[side] = "recorded"
