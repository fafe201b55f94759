"""Plain text for people, from the data that the stages return. No colours and no boxes: it pastes into a report."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm_export.doctor import Finding
from mmm_export.inspection import state_bytes

if TYPE_CHECKING:
    from mmm_export.manifest import Manifest
    from mmm_export.plugins.build import BuildReport
    from mmm_export.runtime import GenerationStatistics

WIDTH = 100


def size(count: float) -> str:
    """Bytes in the unit that fits: "512 bytes", "16.0 MiB", "5.11 GiB"."""
    for unit, decimals in (("bytes", 0), ("KiB", 1), ("MiB", 1)):
        if count < 1024:
            return f"{count:.{decimals}f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def printable(text: str) -> str:
    """Text with control characters spelt out: a manifest or a state file must not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], *, indent: int = 0) -> str:
    """Align columns by spaces; the last one is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def inspection(data: Mapping[str, Any]) -> str:
    """Render what `mmm_export.inspection.inspect` returns."""
    parts = [f"{data['kind']} {data['path']}"]
    plain = [(key.replace("_", " "), _plain(key, value)) for key, value in data.items() if _is_plain(key, value)]
    if plain:
        parts.append(table(plain, indent=2))
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            rows = [
                (printable(name) if key == "files" else _label(name), _cell(key, name, cell))
                for name, cell in value.items()
            ]
            parts.append(f"{key}\n{table(rows, indent=2)}")
    if data.get("findings"):
        lines = [
            textwrap.fill(printable(text), WIDTH, initial_indent="  - ", subsequent_indent="    ")
            for text in data["findings"]
        ]
        parts.append("\n".join(["findings", *lines]))
    return "\n\n".join(parts)


def _is_plain(key: str, value: object) -> bool:
    return key not in ("kind", "path") and not isinstance(value, (Mapping, list, tuple)) and value not in ("", None)


def _plain(key: str, value: object) -> str:
    if key == "parameters" and isinstance(value, int):
        return f"{value:,}"
    return size(value) if key.endswith("bytes") and isinstance(value, int) else printable(str(value))


def _label(name: str) -> str:
    return printable(name).replace("_bytes_per_token", " per token").removesuffix("_bytes").replace("_", " ")


def _cell(group: str, name: str, value: object) -> str:
    is_size = group == "files" or "bytes" in name
    if isinstance(value, bool):
        return "yes" if value else "no"
    return size(value) if is_size and isinstance(value, int) else printable(str(value))


def findings(found: Sequence[Finding]) -> str:
    """Render what `mmm_export.doctor.examine` returns: what is there, then what is missing and how to get it."""
    present = [(f.name, printable(str(f.found))) for f in found if f.found]
    missing = [(f.name, f"for {f.purpose}", f.hint) for f in found if not f.found]
    parts = [f"found\n{table(present, indent=2)}"]
    if missing:
        parts.append(f"not found (each is needed only for the step it names)\n{table(missing, indent=2)}")
    return "\n\n".join(parts)


def export_summary(folder: Path, manifest: Manifest) -> str:
    """Say what an export wrote, what it keeps for each sequence, and what to do next."""
    model = manifest.model
    state = state_bytes(model, manifest.dtype)
    total = sum(info.bytes for info in manifest.files.values())
    lines = [f"wrote {folder}: {manifest.dtype}, {model.layers} layers, {size(total)} in {len(manifest.files)} files"]
    fixed = size(state["ssm_bytes"] + state["conv_bytes"])
    if model.attention_layers:
        cache = size(state["kv_bytes_per_token"] * manifest.max_tokens)
        lines.append(
            f"state: {fixed} for each sequence, and {cache} of KV cache for {manifest.max_tokens} tokens: "
            f"{len(model.attention_layers)} of {model.layers} layers are attention, so memory is not constant"
        )
    else:
        lines.append(f"state: {fixed} for each sequence, whatever its length")
    lines += [f"finding: {printable(text)}" for text in manifest.findings]
    for name, value in manifest.environment.items():
        lines.append(f"note: other programs load these graphs with {name}={value} in their environment")
    lines.append(f"next: mmm-export verify {shlex.quote(str(folder))} --checkpoint CHECKPOINT")
    return "\n".join(lines)


def verification(columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    """Render a comparison: a table for each hop, the first cell of each row, then the lines of the verdict."""
    header = ["", *columns[1:]]
    by_hop: dict[str, list[Sequence[str]]] = {}
    for hop, *cells in rows:
        by_hop.setdefault(hop, []).append(cells)
    parts = [f"{hop}\n{table([header, *cells], indent=2)}" for hop, cells in by_hop.items()]
    return "\n\n".join([*parts, "\n".join(lines)])


ENDINGS = {
    "stop_token": "the model ended it",
    "stop_string": "a stop string came",
    "length": "--max-new-tokens reached",
    "context_full": "the KV cache is full",
    "cancelled": "stopped",
}


def answer_statistics(statistics: GenerationStatistics, finish_reason: str | None) -> str:
    """Say in one line how fast an answer was and why it ended."""
    images = f" ({statistics.image_tokens} of images)" if statistics.image_tokens else ""
    parts = [f"{statistics.prompt_tokens} prompt tokens{images}"]
    if statistics.first_token_s is not None:
        parts.append(f"first token after {statistics.first_token_s:.2f} s")
    parts.append(f"{statistics.new_tokens} new tokens")
    if statistics.decode_tokens_per_s is not None:
        parts.append(f"{statistics.decode_tokens_per_s:.1f} tokens/s")
    return f"[{', '.join(parts)}; {ENDINGS.get(finish_reason or '', finish_reason or 'unfinished')}]"


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
