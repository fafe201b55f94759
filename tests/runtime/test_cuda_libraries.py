"""A session that shall run on a GPU runs there, or says what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from mmm_export.errors import BundleError
from mmm_export.manifest import read_manifest
from mmm_export.runtime import cuda_libraries
from mmm_export.runtime.graph_loading import open_graph


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Each test loads anew, and leaves nothing to the next."""
    cuda_libraries.load_cuda_libraries.cache_clear()
    yield
    cuda_libraries.load_cuda_libraries.cache_clear()


def test_what_is_missing_is_kept_from_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcublas.so.13"), raising=False
    )
    assert cuda_libraries.load_cuda_libraries() == "Failed to load libcublas.so.13"
    assert capsys.readouterr() == ("", "")


def test_an_onnxruntime_that_cannot_load_them_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime, "preload_dlls", raising=False)
    assert cuda_libraries.load_cuda_libraries() == ""


def test_a_session_that_fell_back_to_the_cpu_is_refused_and_names_the_library(
    make_bundle: Callable[..., Path], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(make_checkpoint("linear"))
    # As the real one does without the CUDA libraries: it takes the CPU and goes on.
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcudnn.so.9"), raising=False
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    options: dict[str, Any] = {"providers": ["CUDAExecutionProvider"], "threads": 1}
    with pytest.raises(BundleError) as caught:
        open_graph(bundle, "embedding.onnx", read_manifest(bundle), **options)
    assert "libcudnn.so.9" in str(caught.value.found)
    assert "onnxruntime-gpu[cuda,cudnn]" in str(caught.value.hint)
