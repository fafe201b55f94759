"""What building and inspecting plugin libraries print."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmm_export.rendering.text import WIDTH, printable, size, table

if TYPE_CHECKING:
    from mmm_export.plugins.build import BuildReport

_MOST_NAMES = 8


def plugin_build(report: BuildReport) -> str:
    """What a build of the plugins made: files, what they run on, headers, and what was left out."""
    build = report.build
    gpus = ", ".join(f"sm_{number}" for number in build.architectures)
    rows = [
        ["for", f"{build.machine}, {f'CUDA {build.cuda}, {gpus}' if build.cuda else 'no GPU'}"],
        *(["headers", f"{found.name} {found.version} ({printable(str(found.folder))})"] for found in report.headers),
        *([name, size(count)] for name, count in sorted(report.file_bytes.items())),
        *(["note", note] for note in report.notes),
    ]
    how = "found in the cache" if report.reused else f"built in {report.seconds:.0f} s"
    return f"{printable(str(report.folder))}: {how}\n{table(rows, indent=2)}"


def plugin_inspection(data: Mapping[str, Any]) -> str:
    """Render what `mmm_export.plugins.inspection.inspect_library` returns."""
    gpus = [f"sm_{number}" for number in data["architectures"]] + [f"PTX {number}" for number in data["ptx"]]
    rows = [
        ("size", size(data["bytes"])),
        ("machine", data["machine"]),
        ("GPUs", ", ".join(gpus) or "none"),
        *((key, str(data[key])) for key in ("version", "abi", "cuda", "compiler", "headers", "glibc") if data[key]),
        *((key, _shortened(data[key]) or "nothing") for key in ("exported", "needed")),
        ("undefined", f"{len(data['undefined'])} symbols of the libraries above; --json lists them"),
    ]
    shown = [
        textwrap.fill(printable(f"{key:<9}  {value}"), WIDTH, initial_indent="  ", subsequent_indent=" " * 13)
        for key, value in rows
    ]
    parts = ["\n".join([f"{data['kind']} {printable(data['path'])}", *shown])]
    if data["findings"]:
        lines = [
            textwrap.fill(printable(f"{severity}: {text}"), WIDTH, initial_indent="  - ", subsequent_indent="    ")
            for severity, text in data["findings"]
        ]
        parts.append("\n".join(["findings", *lines]))
    return "\n\n".join(parts)


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more; --json lists them" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
