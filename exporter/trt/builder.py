"""Runs the build process for one plan and turns what goes wrong in it into errors that a user can act on."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mmm_export import names
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.libraries import PROGRAM, Library, process_environment
from mmm_export.exporter.trt.source_modules import source_module
from mmm_export.progress import Progress

EVENT = '{"event": '  # what every line of build_process.py begins with
_STAGES = {"parse": "read {plan}'s graph", "build": "build {plan}"}


@dataclass(frozen=True)
class Job:
    """What build_process.py is told; its JSON holds these names."""

    onnx: str
    plan: str
    plugin: str
    embed_plugin: bool
    profiles: list[dict[str, list[list[int]]]]
    capabilities: list[int]
    workspace_bytes: int
    timing_cache: str
    inspect: bool


@dataclass(frozen=True)
class Built:
    """A finished plan. `listings` are (form, text): what the builder logged of its layers, or the inspector said."""

    byte_count: int
    seconds: float
    peak_bytes: int
    listings: tuple[tuple[str, str], ...]


def build_plan(library: Library, job: Job, library_path: Path | None, progress: Progress) -> Built:
    """Build one plan in a process of its own.

    Raises:
        EngineError: TensorRT refuses the graph, the plugin or a setting, or ends the process.
        OSError: the disk is full.
    """
    listings: list[tuple[str, str]] = []
    name = Path(job.plan).name
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        with _process(library, job, library_path, stderr) as process:
            assert process.stdout is not None
            done, error = None, None
            # Libraries print too; ours are the lines that open an object.
            events = (json.loads(line) for line in process.stdout if line.startswith(EVENT))
            stage = next(events, None)
            while stage is not None:
                event, stage = stage, None
                if event["event"] == "stage":
                    with progress.stage(_STAGES[event["title"]].format(plan=name)):
                        for event in events:
                            if event["event"] == "stage":
                                stage = event
                                break
                            done, error = _take(event, listings, done, error)
                else:
                    done, error = _take(event, listings, done, error)
                    stage = next(events, None)
            code = process.wait()
        stderr.seek(0)
        said = stderr.read()
    if error is not None:
        raise _failure(error, job, library, said)
    if code != 0 or done is None:
        raise _ended(code, library, said)
    return Built(int(done["bytes"]), float(done["seconds"]), int(done["peak_bytes"]), tuple(listings))


def _take(
    event: dict[str, Any], listings: list[tuple[str, str]], done: dict[str, Any] | None, error: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Update `listings` by one event; return the last "done" and "error"."""
    if event["event"] == "listing":
        listings.append((event["form"], event["text"]))
    elif event["event"] == "done":
        return event, error
    elif event["event"] == "error":
        return done, event
    return done, error


@contextmanager
def _process(library: Library, job: Job, library_path: Path | None, stderr: Any) -> Iterator[subprocess.Popen[str]]:
    """Start the build; whatever ends the block ends the process too, and waits for it: nothing writes into a folder that is going."""
    file = Path(job.plan).with_suffix(".job.json")
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, library.module, str(file)],
        env=process_environment(library_path),
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the build
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # TensorRT looks at no signal while it compiles
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        with suppress(OSError):
            file.unlink()


def _failure(event: dict[str, Any], job: Job, library: Library, said: str) -> Exception:
    kind, logged = event["kind"], [str(text) for text in event.get("logged", [])]
    if kind == "disk":
        return OSError(event.get("errno") or errno.ENOSPC, event["message"])
    if kind == "parse":
        return _parse_failure(event, job, library, said)
    if kind == "timing cache":
        return EngineError(
            "the timing cache does not fit",
            found=event["message"],
            wanted=f"one of {library.flavor} {library.version_text} and this GPU",
            hint="name another --timing-cache file; it is written anew",
        )
    ours = _plugin_words(said)
    if kind == "plugin":
        return EngineError(
            "the plugin library cannot be loaded",
            found=" ".join([event["message"], *logged])[:400],
            wanted="libmmm_tensorrt.so for this processor",
            hint="mmm-export plugins inspect FILE says what is in it; mmm-export plugins build makes one",
        )
    found = ours or "; ".join(_first_lines(logged)) or event["message"]
    return EngineError(
        f"{library.flavor} {library.version_text} cannot build {Path(job.plan).name}",
        found=found,
        hint=_build_hint(found),
    )


def _parse_failure(event: dict[str, Any], job: Job, library: Library, said: str) -> EngineError:
    errors = event.get("errors") or [{"message": "no reason given", "node": "", "operator": ""}]
    first = errors[0]
    message = _plain(first["message"])
    node = first["node"]
    module = source_module(ir.load(job.onnx), node) if node else None
    where = f"node {node} ({first['operator'] or 'unknown operator'})" if node else "the graph"
    if module:
        where += f", which comes from {module}"
    reason = _plugin_words(said) or message
    return EngineError(
        f"{library.flavor} {library.version_text} cannot read {Path(job.onnx).name}",
        found=f"{where}: {reason}",
        wanted="a graph lowered for the installed version",
        hint=_parse_hint(first["operator"], message),
    )


def _parse_hint(operator: str, message: str) -> str:
    if operator == names.OP_NAME:
        return (
            "the plugin did not take the node: is the library of this version? mmm-export plugins inspect FILE says it"
        )
    if "float8" in message.lower() or "fp8" in message.lower():
        return "this number format needs another device or a newer TensorRT; export or quantize the bundle with another one"
    return (
        f"this TensorRT does not take the operator {operator or 'named above'} as written; "
        "try another --flavor or a newer TensorRT, and report it with the line above"
    )


def _build_hint(found: str) -> str:
    low = found.lower()
    if "hw-specific datatypes" in low:
        return "the device lacks a number format of the bundle: build for another --compute-capability, or quantize to INT8"
    if "compute capabilit" in low:
        return "choose others with --compute-capability"
    if "memory" in low or "alloc" in low:
        return "lower --workspace, --prefill-tokens or --max-batch, or close other programs; --max-alloc-mib cuts the LM head"
    return "run it again with --verbose, and see docs/how-to/debug-an-engine.md"


def _plugin_words(said: str) -> str:
    """Return what our plugin said on stderr, which TensorRT-RTX does not log."""
    lines = [line.strip() for line in said.splitlines() if names.OP_NAME in line or "libmmm" in line]
    return "; ".join(dict.fromkeys(lines))[:400]


def _first_lines(logged: list[str]) -> list[str]:
    return [_plain(text) for text in logged[:3]]


def _plain(message: str) -> str:
    """Leave the sentence and drop the C++ around it: files, functions, codes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("ModelImporter", "In function", "---", "input:", "output:"))]
    text = (kept or lines or [""])[-1]
    for mark in (": INVALID_NODE: ", ": UNSUPPORTED_NODE: ", ": UNSUPPORTED_GRAPH: ", "Assertion failed: "):
        if mark in text:
            text = text.split(mark, 1)[1]
    if '&& "' in text:  # the condition of an assertion, then the sentence for people
        text = text.split('&& "', 1)[1].rstrip('" ')
    return text[:400]


def _ended(code: int, library: Library, said: str) -> EngineError:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
    killed = code == -signal.SIGKILL
    return EngineError(
        f"{library.flavor} {library.version_text} ended while it was building",
        found=": ".join([how, *last])[:400],
        hint="the machine ran out of memory: close other programs, or build with less --prefill-tokens and --max-batch"
        if killed
        else "a fault inside TensorRT; build again with smaller profiles, and report it with the line above",
    )
