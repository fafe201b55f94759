"""TensorRT's Python bindings on host memory: each call that `runtime/tensorrt/library.py` makes, with its real parameter names.

A fake plan names a graph of a bundle, which ONNX Runtime computes when the stream of `fake_cuda` is waited for: on whatever lies
at the bound addresses then. It refuses what TensorRT refuses: shapes outside the profile, unknown or missing addresses, a run
that is recorded before the first plain one.
"""

from __future__ import annotations

import json
import types
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fake_cuda import FakeDriver, StickyError

MAGIC = b"fake plan\n"


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    BF16 = 2
    INT32 = 3
    INT64 = 4
    FP8 = 5


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class ILogger:
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise AssertionError("a logger that does not take messages")


class Behaviour:
    """What a test wants to go wrong.

    Attributes:
        start_error: told to the logger when a runtime is made.
        refuses_library: load_library returns None.
        validity: what TensorRT-RTX answers.
        refuses_plan: deserialize returns None.
        no_context: create_execution_context returns None.
        fail_enqueue: number of the decoder run that cannot be enqueued; likewise `fail_kernel`, whose kernel fails.
        uncapturable: is_stream_capturable says no.
        capture_fails: runs cannot be enqueued while they are recorded.
        on_enqueue: called at every enqueue.
    """

    def __init__(self) -> None:
        self.start_error = ""
        self.refuses_library = False
        self.validity = EngineValidity.VALID
        self.refuses_plan = False
        self.no_context = False
        self.fail_enqueue: int | None = None
        self.fail_kernel: int | None = None
        self.uncapturable = False
        self.capture_fails = False
        self.on_enqueue: Any = lambda: None
        self.runs = 0
        self.shapes: list[tuple[int, ...]] = []  # of the first input, run by run
        self.libraries: list[str] = []
        self.host_code_allowed = False
        self.plain_runs = 0


class FakeTensorRT:
    """One flavor and version, on one fake GPU. `module()` is what is imported."""

    def __init__(self, driver: FakeDriver, flavor: str = "tensorrt", version: str = "10.3.0") -> None:
        self.driver = driver
        self.flavor = flavor
        self.version = version
        self.behaviour = Behaviour()

    def module(self) -> types.ModuleType:
        name = "tensorrt" if self.flavor == "tensorrt" else "tensorrt_rtx"
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        made.__version__ = self.version  # type: ignore[attr-defined]
        fake = self

        class BoundRuntime(Runtime if self.flavor == "tensorrt" else RtxRuntime):  # type: ignore[misc]
            def __init__(self, logger: Any) -> None:
                super().__init__(logger)
                self._fake = fake
                if fake.behaviour.start_error:
                    logger.log(ILogger.ERROR, fake.behaviour.start_error)

        exported = [DataType, TensorIOMode, TensorLocation, ExecutionContextAllocationStrategy, ILogger]
        if self.flavor == "tensorrt-rtx":
            exported.append(EngineValidity)
        for kind in exported:
            setattr(made, kind.__name__, kind)
        made.Runtime = BoundRuntime  # type: ignore[attr-defined]
        return made


class IPluginRegistry:
    def __init__(self, fake: FakeTensorRT) -> None:
        self._fake = fake

    def load_library(self, plugin_path: str) -> Any:
        assert isinstance(plugin_path, str)
        self._fake.behaviour.libraries.append(plugin_path)
        return None if self._fake.behaviour.refuses_library else object()


class Runtime:
    _fake: FakeTensorRT

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self._logger = logger
        self._host_code = False

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._fake.behaviour.host_code_allowed = self._host_code = value

    def get_plugin_registry(self) -> IPluginRegistry:
        return IPluginRegistry(self._fake)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        content = bytes(serialized_engine)
        if self._fake.behaviour.refuses_plan or not content.startswith(MAGIC):
            self._logger.log(ILogger.ERROR, "Error Code 6: the plan is of another version")
            return None
        return ICudaEngine(self._fake, json.loads(content[len(MAGIC) :]), self._logger)


class RtxRuntime(Runtime):
    def get_engine_validity(self, buffer: Any) -> Any:
        bytes(buffer)
        return self._fake.behaviour.validity, 0x10


class ICudaEngine:
    def __init__(self, fake: FakeTensorRT, plan: dict[str, Any], logger: Any) -> None:
        self._fake = fake
        self._plan = plan
        self._logger = logger
        self._tensors = {row["name"]: row for row in plan["tensors"]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        # As the ONNX Runtime backend does: other ways to compute give other roundings.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False
        self._graph = onnxruntime.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return int(self._plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._tensors[name]["input"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name]["dtype"]]

    def get_tensor_shape(self, name: str) -> Any:
        return list(self._tensors[name]["shape"])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._tensors[name].get("location", "DEVICE")]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        assert self._tensors[name]["input"]
        return self._tensors[name]["ranges"][profile_index]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1000 + profile_index

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Any:
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        if self._fake.behaviour.no_context:
            self._logger.log(ILogger.ERROR, "out of memory")
            return None
        return (RtxExecutionContext if self._fake.flavor == "tensorrt-rtx" else IExecutionContext)(self)


_NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BF16": np.uint16,
}


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._fake = engine._fake
        self._profile: int | None = None
        self._scratch: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._flushed = False  # a plain run was done with these shapes

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 77
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._fake.driver.view(memory, size)
        self._scratch = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        assert isinstance(shape, tuple)
        row = self._engine._tensors.get(name)
        if row is None or not row["input"]:
            return False
        least, _, most = row["ranges"][self._profile]
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not fits:
            self._engine._logger.log(ILogger.ERROR, f"{name} {shape} is outside the profile")
            return False
        self._flushed = self._flushed and self._shapes.get(name) == shape
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or not isinstance(memory, int) or memory % 256:
            return False
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name, row in self._engine._tensors.items() if row["input"] and name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        behaviour, driver, engine = self._fake.behaviour, self._fake.driver, self._engine
        assert stream_handle == 77
        needed = engine.get_device_memory_size_for_profile_v2(self._profile or 0)
        if (
            set(engine._tensors) - set(self._addresses)
            or self.infer_shapes()
            or not self._scratch
            or self._scratch[1] < needed
        ):
            engine._logger.log(ILogger.ERROR, "not everything is bound")
            return False
        recorded = driver.recording is not None
        if recorded and (not self._flushed or behaviour.capture_fails):
            engine._logger.log(ILogger.ERROR, "operation not permitted when stream is capturing")
            return False
        is_decoder = "inputs_embeds" in engine._tensors
        behaviour.on_enqueue()
        if is_decoder and not recorded and behaviour.fail_enqueue == behaviour.runs:
            engine._logger.log(ILogger.ERROR, "the plugin refused the call")
            return False
        self._flushed = True
        behaviour.plain_runs += not recorded
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        driver.enqueue(lambda: self._compute(shapes, addresses, is_decoder))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], is_decoder: bool) -> None:
        behaviour = self._fake.behaviour
        if is_decoder:
            behaviour.runs += 1
            if behaviour.fail_kernel == behaviour.runs - 1:
                raise StickyError("illegal address")
            behaviour.shapes.append(shapes["inputs_embeds"])
        feeds = {
            name: self._array(name, addresses[name], shape).copy() for name, shape in shapes.items()
        }  # a copy: ONNX Runtime must not see outputs that share the address
        for name, value in zip(
            [node.name for node in self._engine._graph.get_outputs()], self._engine._graph.run(None, feeds), strict=True
        ):
            self._array(name, addresses[name], value.shape)[...] = value

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(_NUMPY[self._engine._tensors[name]["dtype"]])
        size = int(np.prod(shape)) * kind.itemsize
        return self._fake.driver.view(address, size).view(kind).reshape(shape)


class RtxExecutionContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return not self._fake.behaviour.uncapturable


def write_plan(path: Path, graph: Path, tensors: list[dict[str, Any]], profiles: int) -> None:
    """Write a fake plan: the graph that computes it, and what the engine tells of its tensors."""
    path.write_bytes(MAGIC + json.dumps({"graph": str(graph), "tensors": tensors, "profiles": profiles}).encode())
