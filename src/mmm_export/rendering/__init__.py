"""Plain text for people, from the data that the stages return. No colours and no boxes: it pastes into a report."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm_export.doctor import Finding
from mmm_export.rendering.calibration import calibration_warnings, quantization_summary, sensitivity
from mmm_export.rendering.engine import layer_table
from mmm_export.rendering.text import WIDTH, printable, size, table
from mmm_export.state_bytes import state_bytes

if TYPE_CHECKING:
    from mmm_export.manifest import Manifest
    from mmm_export.runtime import GenerationStatistics

__all__ = ["calibration_warnings", "printable", "quantization_summary", "sensitivity", "size", "table"]


def inspection(data: Mapping[str, Any]) -> str:
    """Render what `mmm_export.inspection.inspect` returns."""
    parts = [f"{data['kind']} {data['path']}"]
    plain = [(key.replace("_", " "), _plain(key, value)) for key, value in data.items() if _is_plain(key, value)]
    if plain:
        parts.append(table(plain, indent=2))
    for key, value in data.items():
        if key == "layers_by_part" and value:
            parts.append(f"layers by part\n{layer_table(value)}")
        elif isinstance(value, Mapping) and value and key not in ("plans", "layer_listing"):
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
    "failed": "it failed",
}


def batch_statistics(prompts: int, failed: int, new_tokens: int, seconds: float) -> str:
    """Say in one line how many prompts were answered, and how fast."""
    without = f", {failed} of them not answered" if failed else ""
    rate = f", {new_tokens / seconds:,.1f} tokens/s" if seconds > 0 else ""
    return f"[{prompts} prompts{without}; {new_tokens:,} new tokens in {seconds:.2f} s, prompts included{rate}]"


def answer_statistics(statistics: GenerationStatistics, finish_reason: str | None) -> str:
    """Say in one line how fast an answer was and why it ended."""
    images = f" ({statistics.image_tokens} of images)" if statistics.image_tokens else ""
    parts = [f"{statistics.prompt_tokens} prompt tokens{images}"]
    if statistics.cached_tokens:
        parts.append(f"{statistics.cached_tokens} from the state cache")
    if statistics.first_token_s is not None:
        parts.append(f"first token after {statistics.first_token_s:.2f} s")
    parts.append(f"{statistics.new_tokens} new tokens")
    if statistics.decode_tokens_per_s is not None:
        parts.append(f"{statistics.decode_tokens_per_s:.1f} tokens/s")
    return f"[{', '.join(parts)}; {ENDINGS.get(finish_reason or '', finish_reason or 'unfinished')}]"
