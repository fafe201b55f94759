"""Stands in for the Python module of TensorRT where a test needs one that builds here: it writes a plan of a few bytes, and fails as
FAKE_TENSORRT asks: "parse", "plugin", "build", "cache", "abort", "killed", "hang", "disk", "no-inspector".

Names and signatures are those of TensorRT 10.3's bindings as far as build_process.py calls them.
"""

from __future__ import annotations

import enum
import json
import os
import time
from pathlib import Path

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0.30")
_FAILURE = os.environ.get("FAKE_TENSORRT", "")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class BuilderFlag(enum.Enum):
    TF32 = 7


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class _Registry:
    def load_library(self, plugin_path: str) -> object | None:
        return None if _FAILURE == "plugin" else object()


def get_plugin_registry() -> _Registry:
    return _Registry()


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


class _ParserError:
    def desc(self) -> str:
        return (
            "In node 3 with name: node_matmul and operator: MatMul (importMatMul): UNSUPPORTED_NODE: "
            'Assertion failed: (a < b) && "this MatMul is too wide"'
        )

    def node_name(self) -> str:
        return "node_matmul"

    def node_operator(self) -> str:
        return "MatMul"


class OnnxParser:
    def __init__(self, network: object, logger: ILogger) -> None:
        self.num_errors = 1

    def parse_from_file(self, path: str) -> bool:
        assert Path(path).is_file()
        return _FAILURE != "parse"

    def get_error(self, index: int) -> _ParserError:
        return _ParserError()


class _Profile:
    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert len(min) == len(opt) == len(max)


class _TimingCache:
    def serialize(self) -> bytes:
        return b"timings"


class _Config:
    def __init__(self) -> None:
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.plugins_to_serialize: list[str] = []
        self.profiles = 0
        self.flags = {BuilderFlag.TF32}

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        pass

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache:
        return _TimingCache()

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        return _FAILURE != "cache"

    def get_timing_cache(self) -> _TimingCache:
        return _TimingCache()

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles += 1
        return self.profiles - 1


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> object:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return object()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: object, config: _Config) -> memoryview | None:
        print('{"a library": "may print"}\nanything', flush=True)  # noqa: T201
        assert not config.flags
        assert config.profiling_verbosity is ProfilingVerbosity.DETAILED
        if _FAILURE == "build":
            self.logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 397410304 bytes.)")
            return None
        if _FAILURE == "abort":
            os.abort()
        if _FAILURE == "killed":
            os.kill(os.getpid(), 9)
        if _FAILURE == "hang":
            time.sleep(600)
        if _FAILURE == "disk":
            raise OSError(28, "No space left on device")
        return memoryview(b"plan of " + __version__.encode())


class _Inspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        tensor = {"Name": "x [profile 1]", "Dimensions": [1, 2], "Datatype": "Half"}
        rows = [{"Name": "gemm [profile 1]", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [tensor]}]
        return json.dumps({"Layers": [{"Name": "plugin", "LayerType": "PluginV3", "Inputs": [], "Outputs": []}, *rows]})


class _Engine:
    def create_engine_inspector(self) -> _Inspector:
        return _Inspector()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        return None if _FAILURE == "no-inspector" else _Engine()
