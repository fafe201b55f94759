"""A few small calls of every kernel, to be run under compute-sanitizer; compares nothing with float64.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitizer_run.py
compute-sanitizer --tool racecheck --error-exitcode 9 python tests/gpu/sanitizer_run.py step chunked

Tensors get allocations of their own (no caching allocator), so that memcheck sees the end of each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu.calls import run
from gpu.inputs import Inputs, Sizes, draw
from gpu.kernels import DEVICE, Kernels, Method, library_path

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on_device(inputs: Inputs) -> Inputs:
    """Copy inputs that were drawn on the CPU, gaps between rows included: fewer kernels of others to check."""

    def copied(value: torch.Tensor) -> torch.Tensor:
        whole = value if value._base is None else value._base
        return whole.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())

    return replace(
        inputs, **{name: copied(value) for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    )


def cases(which: str) -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """Yield the calls of one method."""

    def case(
        sizes: Sizes, io: torch.dtype, state: torch.dtype = FP32, gap: int = 0, **options: Any
    ) -> tuple[Inputs, dict[str, Any]]:
        lengths = [max(sizes.tokens - 3 * row, 0) for row in range(sizes.batch)] if sizes.batch > 1 else None
        return on_device(draw(sizes, io, state, lengths=lengths, gap=gap, device="cpu")), options

    if which == "step":
        for io in (BF16, FP32):
            for batch in (1, 8):
                yield case(Sizes(batch, 1), io, in_place=True)
        yield case(Sizes(3, 1, 4, 1, 48, 96, 4), FP16, BF16)
        yield case(Sizes(2, 1, 3, 1, 16, 16, 3), FP32)
        yield case(Sizes(2, 1), BF16, overlap=1)
    elif which == "chunked":
        chunked = {"gap": 4, "method": Method.CHUNKED}  # of four heads: rows at multiples of 16 bytes
        for segments in (1, 3):
            yield case(Sizes(1, 193), BF16, method=Method.CHUNKED, segments=segments)
            yield case(Sizes(2, 130, 4, 2, 64, 64, 4), FP16, segments=segments, **chunked)
            yield case(Sizes(1, 65, 4, 4), BF16, segments=segments, **chunked)  # one head a block
        yield case(Sizes(2, 193), BF16, method=Method.CHUNKED)
        yield case(Sizes(1, 257, 4, 2, conv_width=4), FP16, BF16, **chunked)
    elif which == "sequential":
        yield case(Sizes(2, 5), FP32, method=Method.SEQUENTIAL)
        yield case(Sizes(2, 7, 4, 1, 48, 96, 3), BF16, method=Method.SEQUENTIAL, in_place=True)
        yield case(Sizes(1, 3, 3, 3, 112, 16, 4), FP16, FP16, method=Method.SEQUENTIAL)
    elif which == "empty":
        yield case(Sizes(2, 0), BF16)
    else:
        sys.exit(f"error: unknown case {which}; wanted step, chunked, sequential, empty")


def main() -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    path = library_path()
    if path is None:
        sys.exit("error: no kernel library\n\nhint: set MMM_KERNEL_LIBRARY, or run mmm-export plugins build")
    kernels, begin, count = Kernels(path), time.monotonic(), 0
    for which in sys.argv[1:] or ["step", "chunked", "sequential", "empty"]:
        for inputs, options in cases(which):
            run(kernels, inputs, **options)
            count += 1
        sys.stdout.write(f"{which}: {count} calls so far, {time.monotonic() - begin:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
