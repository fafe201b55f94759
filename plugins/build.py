"""Compiles the plugin libraries with cmake and nvcc into the cache, or into a folder: whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from mmm_export import __version__
from mmm_export.errors import BuildError, OptionError
from mmm_export.output import output_folder
from mmm_export.plugin_files import BUILD_FILE, PluginBuild, plugin_cache_dir, read_build, write_build
from mmm_export.plugins import sources
from mmm_export.plugins.architectures import dotted
from mmm_export.plugins.compilation import run_logged
from mmm_export.plugins.cudart import aarch64_cudart
from mmm_export.plugins.headers import Headers, find_onnxruntime, find_tensorrt, tensorrt_hint
from mmm_export.plugins.onnxruntime_headers import require_headers
from mmm_export.plugins.toolchain import Toolchain, cuda_include, find_toolchain
from mmm_export.progress import Progress, SilentProgress

TARGETS: dict[str, str] = {  # what people call it: the file
    "kernels": "libmmm_kernels.so",
    "tensorrt": "libmmm_tensorrt.so",
    "onnxruntime": "libmmm_onnxruntime.so",
    "mini-host": "mmm_mini_host",
}
_DEFAULT = ("kernels", "tensorrt", "onnxruntime")  # the mini host is for tests of the TensorRT plugin
_TENSORRT_TARGETS = {"tensorrt", "mini-host"}
_BUILD_TREE_BYTES = 256 << 20  # free space to ask for: objects, libraries and nvcc's temporary files
_LOG_FILE = "build.log"


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Args:
        architectures: compute capabilities, see `parse_architectures`; empty for the CPU reference alone.
        cross: "aarch64" to compile for that processor on another one.
        out: folder to write; None for the cache.
        force: replace `out`, if it holds a build already.
        only: targets to build; None for all whose headers are found.
        tensorrt_include: folder of NvInfer.h.
        onnxruntime_include: folder of onnxruntime_c_api.h.
        jobs: compilers at a time; None for one a processor.
        echo: repeat on stderr what the compilers say.
    """

    architectures: tuple[int, ...] = ()
    cross: str | None = None
    out: Path | None = None
    force: bool = False
    only: tuple[str, ...] | None = None
    tensorrt_include: Path | None = None
    onnxruntime_include: Path | None = None
    jobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What a build made, or found made.

    Args:
        folder: where it lies.
        build: version, machine, CUDA release and architectures.
        file_bytes: size of each file.
        headers: other people's headers that were used.
        notes: what was left out, and why.
        seconds: how long it took, or had taken when it was made.
        reused: it lay in the cache already.
    """

    folder: Path
    build: PluginBuild
    file_bytes: dict[str, int]
    headers: tuple[Headers, ...]
    notes: tuple[str, ...]
    seconds: float
    reused: bool = False


@dataclass
class _Plan:
    """All that a build depends on, settled before anything is compiled."""

    machine: str
    toolchain: Toolchain
    targets: tuple[str, ...]
    headers: tuple[Headers, ...]
    notes: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


def parse_targets(text: str) -> tuple[str, ...]:
    """Turn "kernels,tensorrt" into targets.

    Raises:
        OptionError: a word that is none.
    """
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in TARGETS]
    if unknown or not words:
        raise OptionError(f"--only has no target {', '.join(unknown) or repr(text)}", wanted=", ".join(TARGETS))
    return words


def build_plugins(options: BuildOptions | None = None, *, progress: Progress | None = None) -> BuildReport:
    """Compile the libraries, or reuse a build of the same sources, tools, headers and architectures from the cache.

    Two builds of the same thing wait for each other; an interrupted one leaves nothing.

    Raises:
        BuildError: a tool or header is missing or too old, or a compiler failed.
        OutputError: the folder cannot be written.
    """
    options = options or BuildOptions()
    progress = progress or SilentProgress()
    begin = time.perf_counter()
    plan = _plan(options)
    key = sources.fingerprint(_conditions(plan, options))
    name = "-".join([__version__, key, "_".join(map(str, options.architectures)) or "cpu", plan.machine])
    cached = plugin_cache_dir() / name
    with ExitStack() as stack:
        if options.out is None:
            stack.enter_context(_lock(cached, progress))
        reused = _is_whole(cached)
        if options.out is None and reused:
            return _report(cached, plan, reused=True)
        target = cached if options.out is None else options.out
        force = options.force or options.out is None
        folder = stack.enter_context(
            output_folder(target, force=force, needed_bytes=_BUILD_TREE_BYTES, marker=BUILD_FILE)
        )
        if reused:
            shutil.copytree(cached, folder, dirs_exist_ok=True)
        else:
            _compile(plan, options, folder, begin, progress)
    return _report(target, plan, reused=reused)


def _plan(options: BuildOptions) -> _Plan:
    wanted = options.only or _DEFAULT
    machine = options.cross or platform.machine()
    cross = options.cross if options.cross != platform.machine() else None
    tensorrt = find_tensorrt(options.tensorrt_include, machine) if _TENSORRT_TARGETS & {*wanted} else None
    onnxruntime = find_onnxruntime(options.onnxruntime_include) if "onnxruntime" in wanted else None
    toolchain = find_toolchain(options.architectures, cross)
    include = cuda_include(toolchain.nvcc)
    notes, left_out = [], set()
    if _TENSORRT_TARGETS & {*wanted} and (tensorrt is None or include is None):
        missing, hint = ("TensorRT's headers", tensorrt_hint())
        if tensorrt is not None:
            missing = "cuda_runtime_api.h, which TensorRT's headers include,"
            hint = 'pip install "mmm-export[nvcc]" brings it, or set CUDA_HOME to a CUDA toolkit'
        if options.only or options.tensorrt_include:
            raise BuildError(f"{missing} were not found" if tensorrt is None else f"{missing} was not found", hint=hint)
        left_out |= _TENSORRT_TARGETS
        notes.append(f"left out the TensorRT plugin: no {missing.rstrip(',')}; {hint}")
    if "onnxruntime" in wanted and onnxruntime is None:
        if options.only:
            require_headers()  # raises, and says how to get them
        left_out.add("onnxruntime")
        notes.append(
            "left out the library for ONNX Runtime: no ONNX Runtime headers; "
            "mmm-export plugins build --only onnxruntime says how to get them"
        )
    targets = tuple(name for name in TARGETS if name in wanted and name not in left_out)
    used = tuple(
        found
        for found in (tensorrt, onnxruntime)
        if found is not None and not (found is tensorrt and "tensorrt" in left_out)
    )
    plan = _Plan(machine, toolchain, targets, used, tuple(notes))
    plan.variables = _variables(plan, options, include, cross)
    return plan


def _variables(plan: _Plan, options: BuildOptions, include: Path | None, cross: str | None) -> dict[str, str]:
    """Return what cmake is told."""
    tools = plan.toolchain
    folders = {found.name: found for found in plan.headers}
    tensorrt, onnxruntime = folders.get("TensorRT"), folders.get("ONNX Runtime")
    variables = {
        "MMM_VERSION": __version__,
        "MMM_CUDA": "ON" if options.architectures else "OFF",
        "MMM_CUDA_ARCHITECTURES": ",".join(map(str, options.architectures)),
        "MMM_CUDA_INCLUDE_DIR": str(include or ""),
        "MMM_TENSORRT_INCLUDE_DIR": str(tensorrt.folder) if tensorrt else "",
        "MMM_TENSORRT_HEADERS": str(tensorrt or ""),
        "MMM_ONNXRUNTIME_INCLUDE_DIR": str(onnxruntime.folder) if onnxruntime else "",
        "MMM_ONNXRUNTIME_HEADERS": str(onnxruntime or ""),
        "CMAKE_MAKE_PROGRAM": str(tools.generator_program),
    }
    if tools.nvcc:
        variables["MMM_NVCC"] = str(tools.nvcc.path)
        variables["MMM_NVCC_THREADS"] = str(max(1, min(len(options.architectures), _jobs(options) // 2)))
    if cross:
        variables["CMAKE_TOOLCHAIN_FILE"] = str(sources.FOLDER / "cmake" / f"{cross}-linux-gnu.cmake")
        variables["MMM_AARCH64_CXX"] = str(tools.compiler.path)
        if tools.nvcc:
            variables["MMM_CUDART_STATIC"] = str(aarch64_cudart(tools.nvcc, plugin_cache_dir()))
    else:
        variables["CMAKE_CXX_COMPILER"] = str(tools.compiler.path)
    return variables


def _jobs(options: BuildOptions) -> int:
    return options.jobs or len(os.sched_getaffinity(0))


def _conditions(plan: _Plan, options: BuildOptions) -> list[str]:
    """Name all but the sources that the result depends on; not how many compilers ran at a time."""
    tools = plan.toolchain
    nvcc = tools.nvcc.version if tools.nvcc else "no nvcc"
    kept = ("MMM_CUDA_ARCHITECTURES", "MMM_TENSORRT_INCLUDE_DIR", "MMM_ONNXRUNTIME_INCLUDE_DIR", "MMM_CUDA_INCLUDE_DIR")
    return [
        *(
            plan.machine,
            f"{tools.compiler.path} {tools.compiler.version}",
            nvcc,
            *plan.targets,
            *map(str, plan.headers),
        ),
        *(plan.variables[name] for name in kept),
    ]


def _compile(plan: _Plan, options: BuildOptions, folder: Path, begin: float, progress: Progress) -> None:
    tree = folder / ".build"  # beside the result: on the disk whose free space was asked for, and gone with it
    cmake = str(plan.toolchain.cmake.path)
    configure = [cmake, "-S", str(sources.FOLDER), "-B", str(tree), "-G", plan.toolchain.generator]
    configure += [f"-D{name}={value}" for name, value in plan.variables.items()]
    names = [Path(TARGETS[target]).stem.removeprefix("lib") for target in plan.targets]
    compile_ = [cmake, "--build", str(tree), "--parallel", str(_jobs(options)), "--target", *names]
    for_what = ", ".join(f"SM {dotted(number)}" for number in options.architectures) or "the CPU"
    with _log_kept_on_failure() as log:
        with progress.stage("configuring"):
            run_logged(configure, log, doing="configuring the build", advance=lambda share: None, echo=options.echo)
        title = f"compiling {', '.join(plan.targets)} for {for_what} on {plan.machine}"
        with progress.stage(title, _source_bytes()) as advance:
            share_told = _told_in_bytes(advance)
            run_logged(compile_, log, doing="compiling the plugins", advance=share_told, echo=options.echo)
        log.flush()
        shutil.copyfile(log.name, folder / _LOG_FILE)
    for target in plan.targets:
        shutil.move(tree / TARGETS[target], folder / TARGETS[target])
    shutil.rmtree(tree)
    _write_manifest(plan, options, folder, time.perf_counter() - begin)


def _source_bytes() -> int:
    return sum(path.stat().st_size for path in sources.source_files())


def _told_in_bytes(advance: Callable[[int], None]) -> Callable[[float], None]:
    """Progress is told in bytes: of sources, here."""
    total, done = _source_bytes(), 0

    def tell(share: float) -> None:
        nonlocal done
        now = int(total * min(1.0, share))
        advance(max(0, now - done))
        done = max(done, now)

    return tell


def _write_manifest(plan: _Plan, options: BuildOptions, folder: Path, seconds: float) -> None:
    tools = plan.toolchain
    build = PluginBuild(__version__, plan.machine, tools.nvcc.version if tools.nvcc else None, options.architectures)
    write_build(
        folder,
        build,
        targets=list(plan.targets),
        files={TARGETS[name]: _facts(folder / TARGETS[name]) for name in plan.targets},
        headers={
            found.name: {"version": found.version, "folder": str(found.folder), "origin": found.origin}
            for found in plan.headers
        },
        tools={
            "cmake": tools.cmake.version,
            "compiler": f"{tools.compiler.path.name} {tools.compiler.version}",
            "nvcc": tools.nvcc.version if tools.nvcc else None,
        },
        seconds=round(seconds, 1),
    )


def _facts(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds a build with all files as they were written."""
    if read_build(folder) is None:
        return False
    try:
        files = json.loads((folder / BUILD_FILE).read_text(encoding="utf-8"))["files"]
        return all(_facts(folder / name) == facts for name, facts in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _report(folder: Path, plan: _Plan, *, reused: bool) -> BuildReport:
    build = read_build(folder)
    if build is None:
        raise BuildError(f"{folder} was removed while it was being read", hint="run the build again")
    seconds = float(json.loads((folder / BUILD_FILE).read_text(encoding="utf-8"))["seconds"])
    sizes = {TARGETS[name]: (folder / TARGETS[name]).stat().st_size for name in plan.targets}
    return BuildReport(folder.absolute(), build, sizes, plan.headers, plan.notes, seconds, reused)


@contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time build into a folder of the cache; the others wait and then find the build."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target.parent / f".{target.name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise BuildError(
            "the cache of plugin builds cannot be written",
            found=f"{error.strerror} in {target.parent}",
            wanted="a folder that you may write to",
            hint="choose another cache with MMM_EXPORT_CACHE or XDG_CACHE_HOME, or a folder with --out",
        ) from error
    try:
        with suppress(OSError):  # some network file systems have no locks; then both build, and either result is whole
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with progress.stage("waiting for another build of the same"):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _log_kept_on_failure() -> Iterator[TextIO]:
    """Yield a log file that stays only if a program failed, so that the error can name it."""
    descriptor, name = tempfile.mkstemp(prefix="mmm-export-plugins-", suffix=".log")
    os.close(descriptor)
    with Path(name).open("w", encoding="utf-8", errors="replace") as log:  # by its name, so that log.name is one
        try:
            yield log
        except BuildError:
            raise
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    Path(name).unlink(missing_ok=True)
