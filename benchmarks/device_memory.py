"""GPU memory of this process, by the driver."""

from __future__ import annotations

import torch


class DeviceMemory:
    """GPU memory in use beyond what was in use when this was made, just after the process got its CUDA context."""

    metric = "GPU memory in use (cudaMemGetInfo) beyond the process's empty CUDA context"

    def __init__(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.cuda.empty_cache()
        self._before = self._used()

    def read(self) -> int:
        return self._used() - self._before

    @staticmethod
    def _used() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
