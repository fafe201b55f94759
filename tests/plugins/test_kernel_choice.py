"""Which library computes the scan of a bundle: the cache's newest fitting one, a named one, or none."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles.operator_library import operator_library
from oracle.compare import relative_error

from mmm_export import __version__
from mmm_export.errors import KernelError, MissingPackageError, OptionError
from mmm_export.exporter.verify import VerifyOptions, verify_bundle
from mmm_export.manifest import read_manifest
from mmm_export.operator_library import CPU_PROVIDER, CUDA_PROVIDER, choose_library
from mmm_export.plugin_files import PluginBuild, find_library, library_file, plugin_cache_dir, read_build, write_build
from mmm_export.plugins import onnxruntime_headers
from mmm_export.runtime import Session, graph_loading

HERE = PluginBuild(__version__, platform.machine(), None, ())
KINDS = ("linear", "hybrid")


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> Path:
    """An empty cache instead of the user's."""
    monkeypatch.setenv("MMM_EXPORT_CACHE", str(tmp_path / "cache"))
    return plugin_cache_dir()


def put_build(folder: Path, build: PluginBuild, *, content: bytes = b"library", age_s: int = 0) -> Path:
    folder.mkdir(parents=True)
    library_file("onnxruntime", folder).write_bytes(content)
    write_build(folder, build, remark="not read back")
    written = (folder / "build.json").stat().st_mtime_ns - age_s * 10**9
    os.utime(folder / "build.json", ns=(written, written))
    return library_file("onnxruntime", folder)


def logits_of(bundle: Path, kernels: Any) -> list[Any]:
    """Logits of a prefill over two chunks, of a step, and of what follows a prompt in a second context."""
    with Session.open(bundle, kernels=kernels, chunk_tokens=16) as session:
        ids = np.random.default_rng(0).integers(3, 300, 23)
        logits = [session.prefill(ids), session.step(5)]
        session.reset()
        return [*logits, session.prefill(ids[:1])]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_gives_the_same_logits_with_the_library(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path, kind: str, dtype: str
) -> None:
    bundle = make_bundle(make_checkpoint(kind), dtype=dtype)
    # The two differ by roundings of one scan in each layer: some units of float32, which the layers behind carry on; with
    # fp16 by now and then one unit, 2**-11, of an activation.
    bound = {"fp32": 1e-5, "fp16": 4 * 2.0**-11}[dtype]
    for ours, body in zip(logits_of(bundle, library), logits_of(bundle, "none"), strict=True):
        assert relative_error(ours, body) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_verification_passes_with_the_library_and_says_so(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path, kind: str
) -> None:
    checkpoint = make_checkpoint(kind)
    report = verify_bundle(make_bundle(checkpoint), checkpoint, VerifyOptions(kernels=library))
    assert report.passed
    assert any(str(library) in note for note in report.notes)


def test_auto_takes_the_library_of_the_cache(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path, cache: Path
) -> None:
    bundle = make_bundle(make_checkpoint())
    with Session.open(bundle) as session:
        assert session.kernels is None
    put = put_build(cache / "one", HERE)
    shutil.copy(library, put)
    with Session.open(bundle) as session:
        assert session.kernels == put
        session.step(5)
    with Session.open(bundle, kernels="none") as session:
        assert session.kernels is None


def test_a_library_stands_in_for_an_operator_that_onnxruntime_lacks(
    make_checkpoint: Callable[..., Path],
    make_bundle: Callable[..., Path],
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle(make_checkpoint(), body="linear-attention")
    monkeypatch.setattr(graph_loading, "has_linear_attention", lambda: False)
    with Session.open(bundle, kernels=library) as session:
        session.step(5)


def test_the_newest_fitting_build_is_found(cache: Path) -> None:
    assert find_library("onnxruntime") is None
    put_build(cache / "old", HERE, age_s=60)
    newest = put_build(cache / "new", HERE)
    put_build(cache / "other-version", dataclasses.replace(HERE, version="0.0.1"), age_s=-60)
    put_build(cache / "other-machine", dataclasses.replace(HERE, machine="s390x"), age_s=-60)
    put_build(cache / "interrupted", HERE).parent.joinpath("build.json").unlink()
    put_build(cache / "damaged", HERE).parent.joinpath("build.json").write_text("{")
    put_build(cache / "emptied", HERE, age_s=-60).unlink()
    assert find_library("onnxruntime") == newest
    assert find_library("tensorrt") is None
    assert find_library("onnxruntime", cuda=True) is None
    with_cuda = put_build(cache / "cuda", dataclasses.replace(HERE, cuda="13.0", architectures=(87,)), age_s=120)
    assert find_library("onnxruntime", cuda=True) == with_cuda
    assert read_build(with_cuda.parent) == dataclasses.replace(HERE, cuda="13.0", architectures=(87,))


def test_auto_asks_for_a_library_only_where_it_would_be_used(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], cache: Path
) -> None:
    manifest = read_manifest(make_bundle(make_checkpoint()))
    put = put_build(cache / "one", HERE)
    assert choose_library("auto", manifest, [CPU_PROVIDER]) == put
    assert choose_library("auto", manifest, [CUDA_PROVIDER, CPU_PROVIDER]) is None  # this one computes on the CPU alone
    assert choose_library("auto", manifest, ["OpenVINOExecutionProvider", CPU_PROVIDER]) is None
    assert choose_library("auto", dataclasses.replace(manifest, body="standard-ops"), [CPU_PROVIDER]) is None


def test_a_library_that_is_not_there_is_told(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = make_bundle(make_checkpoint())
    for path in (tmp_path / "no-such.so", tmp_path):
        with pytest.raises(OptionError, match="no kernel library") as caught:
            Session.open(bundle, kernels=path)
        assert "libmmm_onnxruntime.so" in str(caught.value.wanted)


def test_a_file_that_is_no_library_is_told_with_the_way_out(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], cache: Path
) -> None:
    bundle = make_bundle(make_checkpoint())
    put = put_build(cache / "one", HERE)
    with pytest.raises(KernelError, match="cannot use the kernel library") as caught:
        Session.open(bundle)
    assert str(put) in str(caught.value)
    assert "--kernels none" in str(caught.value.hint)


def test_headers_are_looked_for_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(OptionError, match="ONNXRUNTIME_INCLUDE_DIR"):
        onnxruntime_headers.find_headers()
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "onnxruntime_c_api.h").touch()
    assert onnxruntime_headers.find_headers() == tmp_path / "onnxruntime"


def test_missing_headers_are_told_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(onnxruntime_headers, "_SYSTEM", ())
    with pytest.raises(MissingPackageError, match="C header") as caught:
        onnxruntime_headers.require_headers()
    assert "libonnxruntime-dev" in str(caught.value.hint)
