"""Fixtures of the kernel tests: the library, and the table of worst errors at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpu.cuda_sessions import CAPACITY, CHUNK

if TYPE_CHECKING:
    from mmm_export.runtime import Session


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The library under test; skips with the reason where it or its device is missing."""
    import torch

    from gpu.kernels import DEVICE, Kernels, library_path

    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = library_path()
    if path is None:
        pytest.skip("no library: build it (mmm-export plugins build) or name it in MMM_KERNEL_LIBRARY")
    torch.backends.cuda.matmul.allow_tf32 = False  # the references are float64, but nothing here may round on its own
    return Kernels(path)


@pytest.fixture(scope="module")
def cuda_provider() -> None:
    """ONNX Runtime with its CUDA provider, and a GPU; skips with the reason where they are missing."""
    torch = pytest.importorskip("torch")  # whose CUDA libraries onnxruntime finds once they are loaded
    onnxruntime = pytest.importorskip("onnxruntime")
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a GPU and onnxruntime-gpu")


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, make_bundle: Callable[..., Path]) -> Iterator[Session]:
    """The checkpoint in fp32 on the CPU, by the function body: what sessions on the GPU are held to."""
    from mmm_export.runtime import Session

    with Session.open(make_bundle(checkpoint, max_tokens=CAPACITY), kernels="none", chunk_tokens=CHUNK) as session:
        yield session


@pytest.fixture(autouse=True)
def _device_still_works(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the run when a kernel has broken the CUDA context: every later failure would be its echo."""
    yield
    import torch

    if "kernels" in request.fixturenames and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the CUDA context is lost after {request.node.name}: {str(error).splitlines()[0]}", 3)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from gpu.bounds import table_lines

    lines = table_lines()
    if not lines:
        return
    terminalreporter.section("worst relative L2 error against float64")
    for line in lines:
        terminalreporter.write_line(line)
    collected = os.environ.get("MMM_ERROR_TABLE")
    if collected:
        with Path(collected).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
