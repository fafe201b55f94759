"""What an engine needs is checked in order before a plan is loaded, and each refusal says what to do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeMachine, install, rewrite
from fake_tensorrt import MAGIC, EngineValidity

from mmm_export import names
from mmm_export.engine_manifest import read_engine_manifest
from mmm_export.errors import EngineError, KernelError, MissingPackageError, MmmError, OptionError
from mmm_export.plugin_files import PluginBuild, write_build
from mmm_export.runtime import Session


@pytest.fixture
def engine(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def refusal(engine: Path, kind: type[MmmError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Session.open(engine, **options)
    assert caught.value.hint
    return str(caught.value)


def test_engine_that_fits_opens(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine) as session:
        assert session.capacity is None
        assert machine.behaviour.libraries == [str((engine / names.PLUGIN_LIBRARY).resolve())]


def test_changed_plan_is_refused_before_any_library_is_imported(engine: Path) -> None:
    (engine / names.DECODER_PLAN).write_bytes((engine / names.DECODER_PLAN).read_bytes()[:-1] + b"?")
    assert "was changed" in refusal(engine, EngineError)


def test_engine_for_another_platform_is_refused_before_any_library_is_imported(engine: Path) -> None:
    rewrite(engine, platform="riscv64-linux")
    assert "riscv64-linux" in refusal(engine, EngineError)


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_missing_library_names_its_packages(flavor: str, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(engine, flavor=flavor)
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("mmm_export.tensorrt_packages.find_spec", lambda name: None)
    assert flavor.replace("-", "_") in refusal(engine, MissingPackageError)


def test_broken_library_tells_what_it_lacks(
    engine: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("mmm_export.tensorrt_packages.importlib.import_module", fail)
    assert "libnvinfer.so.10" in refusal(engine, MissingPackageError)


@pytest.mark.parametrize(
    ("installed", "fits"), [("10.3.0", True), ("10.3.0.30", True), ("10.3.0.31", False), ("10.7.0", False)]
)
def test_only_the_version_that_built_a_plan_loads_it(
    installed: str, fits: bool, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version=installed)
    if fits:
        Session.open(engine).close()
    else:
        text = refusal(engine, EngineError)
        assert installed in text
        assert "10.3.0.30" in text


@pytest.mark.parametrize(("installed", "fits"), [("1.7.1.116", True), ("1.9", True), ("2.0", False)])
def test_rtx_is_asked_itself_within_a_major_version(
    installed: str, fits: bool, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(engine, flavor="tensorrt-rtx", tensorrt_version="1.7.1.116")
    machine = install(monkeypatch, flavor="tensorrt-rtx", version=installed)
    if fits:
        Session.open(engine).close()
        machine.behaviour.validity = EngineValidity.INVALID
        assert "calls it invalid" in refusal(engine, EngineError)
    else:
        assert "another version" in refusal(engine, EngineError)


def test_missing_cuda_bindings_name_their_package(
    engine: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver")
    assert "cuda-bindings" in refusal(engine, MissingPackageError)


def test_missing_driver_is_told(engine: Path, machine: FakeMachine) -> None:
    machine.driver.has_driver = False
    assert "libcuda" in refusal(engine, MissingPackageError)


def test_no_gpu_is_told(engine: Path, machine: FakeMachine) -> None:
    machine.driver.count = 0
    assert "no GPU 0" in refusal(engine, MmmError)


def test_engine_for_another_gpu_names_both(engine: Path, machine: FakeMachine) -> None:
    machine.driver.capability = 90
    text = refusal(engine, EngineError)
    assert "SM 9.0 (Fake GPU)" in text
    assert "SM 8.7" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": "f" * 64}, "was changed"),
        ({"abi": 9}, "kernel interface 9"),
        ({"machine": "riscv64"}, "riscv64"),
        ({"architectures": (86, 90)}, "SM 8.6, SM 9.0"),
        ({"architectures": ()}, "a CPU alone"),
        ({"file": ""}, "names no plugin library"),
    ],
)
def test_plugin_library_that_does_not_fit_is_refused(
    change: dict[str, Any], told: str, engine: Path, machine: FakeMachine
) -> None:
    if change.get("architectures"):
        machine.driver.capability = 80
        rewrite(engine, compute_capabilities=(80,))
    plugin = dataclasses.replace(read_engine_manifest(engine).plugin, **change)
    rewrite(engine, plugin=plugin)
    assert told in refusal(engine, KernelError, check_content=False)


def test_plugin_for_an_earlier_revision_of_the_generation_fits(engine: Path, machine: FakeMachine) -> None:
    rewrite(engine, plugin=dataclasses.replace(read_engine_manifest(engine).plugin, architectures=(86,)))
    Session.open(engine).close()


def test_embedded_plugin_is_allowed_and_no_file_is_loaded(engine: Path, machine: FakeMachine) -> None:
    (engine / names.PLUGIN_LIBRARY).unlink()
    rewrite(engine, plugin=dataclasses.replace(read_engine_manifest(engine).plugin, embedded=True, file=""))
    Session.open(engine).close()
    assert machine.behaviour.host_code_allowed
    assert machine.behaviour.libraries == []


def test_library_that_tensorrt_does_not_take_is_told(engine: Path, machine: FakeMachine) -> None:
    machine.behaviour.refuses_library = True
    assert names.PLUGIN_LIBRARY in refusal(engine, KernelError)
    assert not machine.driver.device_memory


def test_too_little_memory_is_told_before_a_plan_is_loaded(engine: Path, machine: FakeMachine) -> None:
    machine.driver.free_bytes = 1 << 20
    machine.behaviour.refuses_plan = True
    text = refusal(engine, EngineError)
    assert "0.00 GiB free" in text
    assert "--prefill-tokens" in text


def test_memory_that_a_jetson_would_get_from_its_page_cache_counts(
    engine: Path, machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable:    6000000 kB\n")
    monkeypatch.setattr("mmm_export.runtime.tensorrt.cuda._MEMINFO", tmp_path / "meminfo")
    machine.driver.free_bytes = 1 << 20
    refusal(engine, EngineError)
    machine.driver.integrated = True
    Session.open(engine).close()


def test_runtime_that_cannot_start_is_refused_with_its_words(engine: Path, machine: FakeMachine) -> None:
    machine.behaviour.start_error = "CUDA initialization failure with error: 35"
    assert "error: 35" in refusal(engine, EngineError)


def test_refused_plan_is_told_with_the_words_of_the_library(engine: Path, machine: FakeMachine) -> None:
    machine.behaviour.refuses_plan = True
    assert "Error Code 6: the plan is of another version" in refusal(engine, EngineError)
    assert machine.driver.retained == 0


def test_context_that_cannot_be_made_is_told(engine: Path, machine: FakeMachine) -> None:
    machine.behaviour.no_context = True
    assert "out of memory" in refusal(engine, EngineError)
    assert not machine.driver.device_memory


def changed_plan(engine: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = engine / names.DECODER_PLAN
    plan = json.loads(path.read_bytes()[len(MAGIC) :])
    change(plan)
    path.write_bytes(MAGIC + json.dumps(plan).encode())
    rewrite(engine)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: plan["tensors"].pop(0), "no input inputs_embeds"),
        (lambda plan: plan["tensors"][0].update(dtype="HALF"), "float16"),
        (lambda plan: plan["tensors"][0].update(dtype="FP8"), "FP8"),
        (lambda plan: plan["tensors"][0].update(location="HOST"), "in host memory"),
        (lambda plan: plan["tensors"][0]["shape"].__setitem__(2, 7), "7"),
        (lambda plan: plan["tensors"].append({**plan["tensors"][-1], "name": "extra"}), "extra besides"),
        (lambda plan: plan.update(profiles=1), "1 profiles"),
        (lambda plan: plan["tensors"][0]["ranges"][0][2].__setitem__(1, 4), "to (1, 4,"),
    ],
)
def test_plan_that_is_not_what_its_manifest_says_is_refused(
    change: Any, told: str, engine: Path, machine: FakeMachine
) -> None:
    changed_plan(engine, change)
    assert told in refusal(engine, EngineError)


def test_table_of_another_size_is_refused(engine: Path, machine: FakeMachine) -> None:
    with (engine / names.EMBEDDING_TABLE).open("ab") as stream:
        stream.write(b"\0\0\0\0")
    rewrite(engine)
    assert "not the table of its manifest" in refusal(engine, EngineError)


@pytest.mark.parametrize("option", [{"providers": "cuda"}, {"threads": 2}])
def test_options_that_only_a_bundle_takes_are_refused(
    option: dict[str, Any], engine: Path, machine: FakeMachine
) -> None:
    assert "an engine takes no" in refusal(engine, OptionError, **option)


def test_plugin_library_of_this_machine_takes_the_place_of_the_engines(
    engine: Path, machine: FakeMachine, tmp_path: Path
) -> None:
    other = dataclasses.replace(
        read_engine_manifest(engine).plugin, architectures=()
    )  # built with --any-plugin elsewhere
    rewrite(engine, plugin=other)
    assert "a CPU alone" in refusal(engine, KernelError)
    built = tmp_path / "build"
    built.mkdir()
    library = built / names.PLUGIN_LIBRARY
    assert "no plugin library" in refusal(engine, OptionError, kernels=library)
    library.write_bytes(b"built here")
    write_build(built, PluginBuild("0.1", "aarch64", "12.6", (90,)))
    assert "SM 9.0" in refusal(engine, KernelError, kernels=library)
    write_build(built, PluginBuild("0.1", "aarch64", "12.6", (87,)))
    Session.open(engine, kernels=library).close()
    assert machine.behaviour.libraries == [str(library.resolve())]
