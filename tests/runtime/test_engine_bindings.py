"""Every name and parameter that the TensorRT backend and its fakes use exists in the genuine Python bindings."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import pytest
from tensorrt_tools import runtimes

import mmm_export.runtime.tensorrt.cuda
import mmm_export.runtime.tensorrt.library

SIGNATURES = Path(runtimes.__file__).with_name("binding_signatures.py")
LIBRARY = Path(runtimes.__file__).with_name("session_library.py")
MODULES = {
    "lean-10": ("tensorrt_lean_bindings", "tensorrt"),
    "lean-11": ("tensorrt_lean_bindings", "tensorrt"),
    "rtx": ("tensorrt_rtx_bindings", "tensorrt-rtx"),
}
# Names in library.py that hold an object of the bindings, and its class there; "" is the module.
HOLDERS = {
    "_trt": "",
    "trt": "",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "context": "IExecutionContext",
}
RTX_ALONE = {
    ("", "EngineValidity"),
    ("EngineValidity", "INVALID"),
    ("Runtime", "get_engine_validity"),
    ("IExecutionContext", "is_stream_capturable"),
}
ELSEWHERE = {("IExecutionContext", "device_memory")}  # for versions older than the fake plays


def used_names(module: Any, holders: dict[str, str]) -> dict[str, set[str]]:
    """Attributes that a module's source takes from each class of the bindings; "ILogger.ERROR" counts for ILogger."""
    used: dict[str, set[str]] = {owner: set() for owner in holders.values()}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = holders.get(_name(node.args[0])), node.args[1]
            if owner is not None and isinstance(name, ast.Constant):
                used[owner].add(name.value)
        if not isinstance(node, ast.Attribute):
            continue
        owner = holders.get(_name(node.value))
        if owner is not None and not _name(node).startswith("_"):
            used[owner].add(node.attr)
        inner = node.value
        if isinstance(inner, ast.Attribute) and holders.get(_name(inner.value)) == "":
            used.setdefault(inner.attr, set()).add(node.attr)
    return used


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "?"


LIBRARY_NAMES = used_names(mmm_export.runtime.tensorrt.library, HOLDERS)
LIBRARY_NAMES["IPluginRegistry"] = {"load_library"}  # of what get_plugin_registry returns
LIBRARY_NAMES[""] -= {"Logger"}
CUDA_NAMES = used_names(mmm_export.runtime.tensorrt.cuda, {"_cuda": "", "cuda": "", "kinds": "CUdevice_attribute"})


def ask(name: str, module: str, wanted: dict[str, set[str]]) -> Any:
    text = json.dumps({owner: sorted(names) for owner, names in wanted.items()})
    done = runtimes.run_with_runtime(name, SIGNATURES, module, text)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fits(fake: list[str], real: list[list[Any]]) -> bool:
    """A call with the fake's parameters is one that the real signature takes, with the same names."""
    return fake == [name for name, _ in real[: len(fake)]] and all(has_default for _, has_default in real[len(fake) :])


def test_the_source_is_read_for_names() -> None:
    assert {"Runtime", "ExecutionContextAllocationStrategy", "TensorIOMode"} <= LIBRARY_NAMES[""]
    assert {"execute_async_v3", "set_tensor_address", "is_stream_capturable"} <= LIBRARY_NAMES["IExecutionContext"]
    assert "USER_MANAGED" in LIBRARY_NAMES["ExecutionContextAllocationStrategy"]
    assert {"cuMemAlloc", "cuGraphLaunch", "cuStreamBeginCapture"} <= CUDA_NAMES[""]


def test_the_fake_has_everything_that_the_library_module_uses() -> None:
    for owner, names in LIBRARY_NAMES.items():
        if owner:
            holder: Any = getattr(fake_tensorrt, owner)
            rtx: Any = {"Runtime": fake_tensorrt.RtxRuntime, "IExecutionContext": fake_tensorrt.RtxExecutionContext}
            missing = {n for n in names if not hasattr(rtx.get(owner, holder), n) and (owner, n) not in ELSEWHERE}
            assert missing == set(), owner


@pytest.mark.parametrize("name", MODULES)
def test_tensorrt_has_every_name_and_parameter_that_is_used(name: str) -> None:
    module, flavor = MODULES[name]
    real = ask(name, module, LIBRARY_NAMES)
    for owner, names in LIBRARY_NAMES.items():
        for attribute in names:
            found = real[owner][attribute]
            if (owner, attribute) in RTX_ALONE and flavor == "tensorrt":
                assert found is None, f"{owner}.{attribute}: no longer RTX's alone"
                continue
            assert found is not None, f"{module} has no {owner}.{attribute}"
            fake = _fake_parameters(owner, attribute)
            if found["kind"] == "method" and fake is not None:
                assert any(fits(fake, each) for each in found["signatures"]), (
                    f"{attribute}{fake}: {found['signatures']}"
                )


def _fake_parameters(owner: str, attribute: str) -> list[str] | None:
    """Parameters of the fake's method without self; None for what is no method there."""
    rtx: Any = {"Runtime": fake_tensorrt.RtxRuntime, "IExecutionContext": fake_tensorrt.RtxExecutionContext}
    holder: Any = rtx.get(owner) or (getattr(fake_tensorrt, owner) if owner else None)
    value = None if holder is None else inspect.getattr_static(holder, attribute, None)
    if not inspect.isfunction(value):
        return None
    return [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]


@pytest.mark.parametrize("name", ["cuda-12", "cuda-13"])
def test_cuda_bindings_have_every_name_and_parameter_that_is_used(name: str) -> None:
    real = ask(name, "cuda.bindings.driver", CUDA_NAMES)
    for owner, names in CUDA_NAMES.items():
        for attribute in names:
            found = real[owner][attribute]
            assert found is not None, f"no {owner}.{attribute}"
            if attribute in fake_cuda.FUNCTIONS:
                parameters = list(inspect.signature(fake_cuda.FUNCTIONS[attribute]).parameters)[1:]
                assert any(fits(parameters, each) for each in found["signatures"]), (
                    f"{attribute}: {found['signatures']}"
                )
            else:
                assert not attribute.startswith("cu"), f"{attribute} is not in the fake"


def test_the_fake_driver_has_everything_that_the_cuda_module_uses() -> None:
    for owner, names in CUDA_NAMES.items():
        holder: Any = getattr(fake_cuda, owner) if owner else fake_cuda
        assert {n for n in names if not hasattr(holder, n)} == set(), owner
    assert set(fake_cuda.FUNCTIONS) == {n for n in CUDA_NAMES[""] if n.startswith("cu")}


@pytest.mark.parametrize("name", MODULES)
def test_genuine_bindings_start_load_and_refuse_as_the_backend_expects(name: str, tmp_path: Path) -> None:
    from tensorrt_tools.building import plugin_library

    module, flavor = MODULES[name]
    done = runtimes.run_with_runtime(name, LIBRARY, module, flavor, str(plugin_library()), str(tmp_path))
    assert done.returncode == 0, done.stderr  # freeing what TensorRT made without a driver would end it by a fault
    told = json.loads(done.stdout)
    if told["start"] != "ok":
        assert told["start"].startswith(f"EngineError: {flavor} {told['version']} cannot start on this machine")
        assert "CUDA initialization failure" in told["start"]
        return
    assert told["plugin"] == "ok"
    assert told["plugin of another session"] == "ok"
    assert told["nonsense plugin"].startswith("KernelError")
    assert told["nonsense plan"].startswith("EngineError")
    assert "it gave no reason" not in told["nonsense plan"]
