"""TensorRT's Python bindings, as far as a session needs them. The only module that touches them; both flavors, 10.3 to 11.4."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmm_export.engine_manifest import Flavor, ShapeRange
from mmm_export.errors import EngineError, KernelError, MmmError
from mmm_export.runtime.tensorrt.binding_table import EngineTensor
from mmm_export.tensorrt_packages import import_tensorrt

# numpy's names of TensorRT's types; any other cannot be bound.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
_KEPT_MESSAGES = 20
# Without a usable driver TensorRT tells its logger an error, and returns a runtime around nothing; freeing that ends the process.
_UNUSABLE: list[Any] = []


class TensorRT:
    """The library of one flavor, and a runtime in it.

    Args:
        flavor: which library.

    Raises:
        MissingPackageError: it is not installed, or broken.
        EngineError: it cannot start on this machine.
    """

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor
        self._trt = import_tensorrt(flavor)
        self._messages: list[str] = []
        self._runtime: Any = None

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    def start(self) -> None:
        """Make the runtime. Raises EngineError when the library cannot work with this machine's driver."""
        logger = _logger(self._trt, self._messages)
        try:
            runtime = self._trt.Runtime(logger)
        except Exception as error:
            raise self._cannot_start(error) from error
        if self._messages:
            _UNUSABLE.append((runtime, logger))
            raise self._cannot_start(None)
        self._runtime, self._logger = runtime, logger

    def load_plugins(self, library: Path) -> None:
        """Load the library that holds our operator. Raises KernelError when TensorRT does not take it."""
        try:
            handle = self._runtime.get_plugin_registry().load_library(str(library.resolve()))
        except Exception as error:
            raise self._plugin_refusal(library, error) from error
        if handle is None:
            raise self._plugin_refusal(library, None)

    def allow_embedded_plugins(self) -> None:
        """Let plans load the library that they carry: their hash was checked, so it is the code that was built."""
        self._runtime.engine_host_code_allowed = True

    def load(self, path: Path) -> Engine:
        """Load a plan. Raises EngineError with what TensorRT says when it refuses it."""
        self._messages.clear()
        engine = None
        failure: Exception | None = None
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._check_validity(path, content)
            try:
                engine = self._runtime.deserialize_cuda_engine(content)
            except Exception as error:
                failure = error
        if engine is None:
            raise self._refusal(f"{self.flavor} {self.version} cannot load {path}", failure)
        return Engine(self._trt, engine, path.name, self._messages)

    def close(self) -> None:
        self._runtime = None

    def _check_validity(self, path: Path, content: mmap.mmap) -> None:
        """Ask TensorRT-RTX whether the plan fits this machine; TensorRT has no such question and tells by refusing it."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(content)
        if validity == self._trt.EngineValidity.INVALID:
            raise EngineError(
                f"{path} does not fit this machine",
                found=f"{self.flavor} {self.version} calls it invalid: diagnostics {int(diagnostics):#x}",
                hint="build the engine again here: mmm-export trt BUNDLE -o ENGINE",
            )

    def _cannot_start(self, error: BaseException | None) -> EngineError:
        return EngineError(
            f"{self.flavor} {self.version} cannot start on this machine",
            found=_said(self._messages, error),
            hint="does nvidia-smi show the GPU, and is its driver new enough for this version? mmm-export doctor",
        )

    def _refusal(self, what: str, error: BaseException | None) -> EngineError:
        return EngineError(
            what,
            found=_said(self._messages, error),
            hint="the engine must be built by the same version, for the same GPU: mmm-export trt BUNDLE -o ENGINE",
        )

    def _plugin_refusal(self, library: Path, error: BaseException | None) -> KernelError:
        return KernelError(
            f"{self.flavor} {self.version} cannot load the plugin library {library}",
            found=_said(self._messages, error),
            hint="build it and the engine again on this machine: mmm-export plugins build, then mmm-export trt",
        )


class Engine:
    """A loaded plan. Made by `TensorRT.load`."""

    def __init__(self, trt: Any, engine: Any, file: str, messages: list[str]) -> None:
        self._trt = trt
        self._engine = engine
        self._file = file
        self._messages = messages

    def tensors(self) -> tuple[EngineTensor, ...]:
        """Every input and output, as the engine tells it."""
        engine, trt = self._engine, self._trt
        profiles = range(engine.num_optimization_profiles)
        rows = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = str(engine.get_tensor_dtype(name).name)
            ranges = (
                ShapeRange(*(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)))
                for profile in (profiles if is_input else ())
            )
            rows.append(
                EngineTensor(
                    name,
                    is_input,
                    _DTYPES.get(dtype, dtype),
                    tuple(engine.get_tensor_shape(name)),
                    engine.get_tensor_location(name) == trt.TensorLocation.DEVICE,
                    tuple(ranges),
                )
            )
        return tuple(rows)

    def scratch_bytes(self, profile: int) -> int:
        """Memory that a run under a profile computes in."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def execution(self, profile: int, scratch: int, scratch_bytes: int, stream: int) -> Execution:
        """Make a context for one profile, which computes in memory that all contexts of a session share, one after another.

        Raises:
            EngineError: TensorRT cannot make it.
        """
        context = None
        failure: Exception | None = None
        self._messages.clear()
        try:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is not None and not context.set_optimization_profile_async(profile, stream):
                context = None
        except Exception as error:
            failure = error
        if context is None:
            raise EngineError(
                f"{self._file} cannot be prepared to run",
                found=_said(self._messages, failure),
                hint="is there enough free memory? mmm-export inspect ENGINE shows what it needs",
            )
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch, scratch_bytes)
        else:  # the first 10.x know the address alone
            context.device_memory = scratch
        return Execution(context, self._file, self._messages)


class Execution:
    """One context: addresses and shapes are set, then it is enqueued. Made by `Engine.execution`."""

    def __init__(self, context: Any, file: str, messages: list[str]) -> None:
        self._context = context
        self._file = file
        self._messages = messages

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raises MmmError when the profile does not take the shape; nothing has run then."""
        self._messages.clear()
        if not self._context.set_input_shape(name, tuple(shape)):
            raise self._failure(f"{name} cannot have the shape {tuple(shape)}")

    def bind(self, name: str, address: int) -> None:
        """Raises MmmError when the tensor does not take the address; nothing has run then."""
        if not self._context.set_tensor_address(name, address):
            raise self._failure(f"{name} cannot be bound")

    def check_complete(self) -> None:
        """Raises MmmError unless every shape is known."""
        self._messages.clear()
        try:
            missing = list(self._context.infer_shapes())
        except Exception as error:
            raise self._failure(f"its shapes cannot be worked out ({error})") from error
        if missing:
            raise self._failure(f"shapes of {', '.join(missing)} are not known")

    def enqueue(self, stream: int) -> None:
        """Enqueue one run. Raises MmmError when TensorRT does not; what ran of it before is not known."""
        self._messages.clear()
        if not self._context.execute_async_v3(stream):
            raise self._failure("it could not be enqueued")

    def is_capturable(self, stream: int) -> bool:
        """Whether a run can be recorded into a graph now; TensorRT itself says so by failing."""
        ask = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX alone has it
        return ask is None or bool(ask(stream))

    def _failure(self, what: str) -> MmmError:
        return MmmError(f"TensorRT failed while running {self._file}", found=f"{what}: {_said(self._messages, None)}")


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that keeps the last errors for our own messages instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                del messages[: -_KEPT_MESSAGES + 1]
                messages.append(msg)

    return Logger()


def _said(messages: list[str], error: BaseException | None) -> str:
    """What TensorRT told, on one line; its first words are nearest to the cause."""
    lines = [" ".join(line.split()) for line in messages if line.strip()]
    if not lines and error is not None:
        lines = [" ".join(str(error).split()) or type(error).__name__]
    return "; ".join(dict.fromkeys(lines))[:400] or "it gave no reason"
