"""Opens the graphs of a bundle with ONNX Runtime, and refuses those that are not what the manifest says."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from mmm_export import names
from mmm_export.environment import environment
from mmm_export.errors import BundleError, OptionError
from mmm_export.manifest import Manifest, TensorInfo
from mmm_export.onnxruntime_support import LINEAR_ATTENTION_SINCE, has_linear_attention
from mmm_export.operator_library import CPU_PROVIDER, CUDA_PROVIDER, register_library
from mmm_export.runtime.cuda_libraries import check_uses_cuda, load_cuda_libraries
from mmm_export.runtime.state_layout import state_layout

_SUFFIX = "ExecutionProvider"

ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}

FATAL = 4  # log severity: errors come as exceptions, so nothing need be printed besides

ProviderChoice = str | tuple[str, dict[str, str]]


def providers_from_names(wanted: Sequence[str] | None) -> list[str]:
    """Full names of the execution providers, in order of preference; the CPU's for None.

    Args:
        wanted: names such as "CPUExecutionProvider" or, short, "cpu"; case does not matter.

    Raises:
        OptionError: a name that this build of ONNX Runtime does not have.

    """
    available = onnxruntime.get_available_providers()
    short = {name.removesuffix(_SUFFIX).lower(): name for name in available}
    providers = []
    for name in [CPU_PROVIDER] if wanted is None else wanted:
        key = name.lower().removesuffix(_SUFFIX.lower())
        if key not in short:
            spellings = {**short, **{full.lower(): full for full in available}}
            near = difflib.get_close_matches(name.lower(), spellings, n=1)
            raise OptionError(
                f"no execution provider {name!r}",
                found=f"onnxruntime {onnxruntime.__version__}",
                wanted=", ".join(available),
                hint=f"did you mean {spellings[near[0]]}?" if near else "GPUs need the package onnxruntime-gpu",
            )
        providers.append(short[key])
    if not providers:
        raise OptionError("no execution provider was named", wanted=", ".join(available))
    return providers


def check_requirements(folder: Path, manifest: Manifest, providers: list[str], library: Path | None = None) -> None:
    """Refuse a bundle that this machine cannot run or whose manifest contradicts itself. Raises BundleError.

    Args:
        folder: the bundle.
        manifest: of that folder.
        providers: full names, in order of preference.
        library: that computes the scan in place of the function body, if one does.

    """
    if manifest.dtype == "bf16" and providers[0] == CPU_PROVIDER:
        raise BundleError(
            f"{folder} holds a bf16 model, which ONNX Runtime cannot compute on a CPU",
            found=f"dtype bf16, provider {CPU_PROVIDER}",
            wanted="fp32 or fp16 for a CPU",
            hint="export it again: mmm-export onnx CHECKPOINT -o BUNDLE --dtype fp32",
        )
    if manifest.needs_kernels and library is None:
        raise BundleError(
            f"{folder} has operators that only our kernel library computes",
            found="no such library for this machine, or --kernels none",
            wanted="libmmm_onnxruntime.so",
            hint="mmm-export plugins build; or export it again without --fuse",
        )
    if manifest.needs_kernels and manifest.dtype == "fp32" and providers[0] == CUDA_PROVIDER:
        raise BundleError(
            f"{folder} holds fused fp32 products, which have no kernel on a GPU",
            found="dtype fp32, provider CUDAExecutionProvider",
            wanted="fp16 or bf16",
            hint="export it again: mmm-export onnx CHECKPOINT -o BUNDLE --fuse --dtype bf16",
        )
    if manifest.body == "linear-attention" and library is None and not has_linear_attention():
        raise BundleError(
            f"{folder} needs a newer ONNX Runtime",
            found=f"onnxruntime {onnxruntime.__version__}, which has no LinearAttention",
            wanted=f"onnxruntime {'.'.join(map(str, LINEAR_ATTENTION_SINCE))} or newer",
            hint="upgrade it, or export again: mmm-export onnx CHECKPOINT -o BUNDLE --body standard",
        )
    for file in names.GRAPH_FILES:
        weights = file + names.WEIGHTS_SUFFIX
        missing = (
            file if file not in manifest.graphs else next((n for n in (file, weights) if n not in manifest.files), "")
        )
        if missing:
            raise BundleError(
                f"{folder} lists no {missing}",
                wanted=f"{', '.join(names.GRAPH_FILES)}, each with its {names.WEIGHTS_SUFFIX} file",
                hint="export the bundle again",
            )
    decoder = manifest.graphs[names.DECODER_FILE]
    inputs = {tensor.name: tensor for tensor in decoder.inputs}
    outputs = {tensor.name: tensor for tensor in decoder.outputs}
    for state in state_layout(manifest):
        wanted = TensorInfo(state.name, state.dtype, ("B", *state.shape[1:]))
        _check_tensor(folder / names.DECODER_FILE, inputs.get(state.name), wanted)
        name = names.present(state.name)
        _check_tensor(folder / names.DECODER_FILE, outputs.get(name), TensorInfo(name, wanted.dtype, wanted.shape))


def open_graph(
    folder: Path,
    file: str,
    manifest: Manifest,
    *,
    providers: Sequence[ProviderChoice],
    threads: int | None,
    library: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open one graph and compare its inputs and outputs with the manifest.

    Args:
        folder: the bundle.
        file: name of the graph's file.
        manifest: the bundle's; `check_requirements` has passed it.
        providers: full names, in order of preference, alone or with options.
        threads: to compute with; None for one a core.
        library: that computes the scan in place of the function body, see `choose_library`.

    Raises:
        BundleError: ONNX Runtime refuses it, or its inputs or outputs are others.
        KernelError: the library cannot be used.

    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    # Prepacking copies the weights, which doubles their memory; otherwise they stay mapped files.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # A memory plan is kept for every chunk length that ever occurs; lengths of prompts are endless.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    if file == names.DECODER_FILE and manifest.quantization is not None:
        for key, value in manifest.quantization.session.items():
            options.add_session_config_entry(key, value)
    if file != names.DECODER_FILE:
        # Threads that spin after an image or a look-up would take the cores from the decoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif library is not None:
        register_library(options, library)
    path = folder / file
    is_cuda = _provider_name(providers[0]) == CUDA_PROVIDER
    try:
        if is_cuda:
            load_cuda_libraries()
        with environment(manifest.environment):
            session = onnxruntime.InferenceSession(path, options, providers=list(providers))
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(
            f"ONNX Runtime cannot open {path}",
            found=first_line(error),
            wanted=f"a graph that onnxruntime {onnxruntime.__version__} runs with {', '.join(map(_provider_name, providers))}",
            hint="export the bundle again, or upgrade onnxruntime",
        ) from error
    if is_cuda:
        check_uses_cuda(session)
    graph = manifest.graphs[file]
    for actual, expected in ((session.get_inputs(), graph.inputs), (session.get_outputs(), graph.outputs)):
        found = {node.name: node for node in actual}
        for tensor in expected:
            node = found.pop(tensor.name, None)
            info = None if node is None else TensorInfo(node.name, _dtype(node.type), tuple(node.shape))
            _check_tensor(path, info, tensor)
        if found:
            raise _mismatch(path, f"{', '.join(found)} besides what the manifest lists", "nothing else")
    return session


def _provider_name(choice: ProviderChoice) -> str:
    return choice if isinstance(choice, str) else choice[0]


def first_line(error: BaseException) -> str:
    """Tell what ONNX Runtime says, without its trace."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_tensor(path: Path, found: TensorInfo | None, wanted: TensorInfo) -> None:
    if found is None:
        raise _mismatch(path, f"no {wanted.name}", _told(wanted))
    fits = len(found.shape) == len(wanted.shape) and all(map(_fits, found.shape, wanted.shape))
    if not fits or found.dtype != wanted.dtype:
        raise _mismatch(path, _told(found), _told(wanted))


def _fits(found: int | str | None, wanted: int | str | None) -> bool:
    """Compare two dimensions; a symbolic one, which ONNX Runtime may name otherwise, fits all."""
    return found == wanted or not (isinstance(found, int) and isinstance(wanted, int))


def _mismatch(path: Path, found: str, wanted: str) -> BundleError:
    return BundleError(
        f"the inputs and outputs of {path} are not those of its model",
        found=found,
        wanted=wanted,
        hint="export the bundle again",
    )


def _told(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _dtype(onnx_type: str) -> str:
    return next((dtype for dtype, name in ONNX_TYPES.items() if name == onnx_type), onnx_type)
