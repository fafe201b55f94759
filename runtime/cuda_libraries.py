"""Finds the CUDA libraries that ONNX Runtime's CUDA provider links, where Python packages brought them."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any

import onnxruntime

from mmm_export.errors import BundleError
from mmm_export.operator_library import CUDA_PROVIDER

INSTALL = 'pip install "onnxruntime-gpu[cuda,cudnn]", or add their folder to LD_LIBRARY_PATH'


@functools.cache
def load_cuda_libraries() -> str:
    """Load cuBLAS, cuDNN and the rest into this process, once, from the packages of NVIDIA or from where the loader finds them.

    Returns: what ONNX Runtime said of those that are missing; nothing where all are there, or where its version cannot tell.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is None:
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Exception):
        preload()
    return said.getvalue().strip()


def check_uses_cuda(session: Any) -> None:
    """Refuse a session that was asked to run on a GPU and does not: where libraries are missing ONNX Runtime takes the CPU instead.

    Raises:
        BundleError: it does not use the CUDA provider.
    """
    if CUDA_PROVIDER in session.get_providers():
        return
    lines = load_cuda_libraries().splitlines()
    raise BundleError(
        "ONNX Runtime cannot use the GPU",
        found=lines[0][:300] if lines else f"providers {', '.join(session.get_providers())}",
        wanted=f"{CUDA_PROVIDER}, with the CUDA libraries that onnxruntime {onnxruntime.__version__} links",
        hint=f"is there a driver (nvidia-smi)? {INSTALL}",
    )
