"""Text of engines: the plan before a build, the result after it, and what is in a folder."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm_export.rendering.text import WIDTH, printable, size, table

if TYPE_CHECKING:
    from mmm_export.engine_manifest import EngineManifest
    from mmm_export.exporter.trt.planning import EnginePlan


def plan_as_json(plan: EnginePlan) -> dict[str, Any]:
    """Return a plan as plain data."""
    from mmm_export.exporter.trt.estimate import usable_bytes
    from mmm_export.exporter.trt.planning import devices_of
    from mmm_export.exporter.trt.targets import dotted

    found, memory = plan.estimate, plan.estimate.memory
    return {
        "bundle": str(plan.bundle),
        "target": plan.target.name,
        "flavor": plan.flavor,
        "version": plan.library.version_text if plan.library else None,
        "assumed_version": None if plan.library else ".".join(map(str, plan.version)),
        "compute_capabilities": [dotted(number) for number in plan.capabilities],
        "precision": plan.manifest.dtype,
        "profiles": {
            "prefill_tokens": list(plan.sizes.profiles.prefill_tokens),
            "max_batch": plan.sizes.profiles.max_batch,
            "max_tiles": plan.sizes.profiles.max_tiles,
            "max_tokens": plan.sizes.max_tokens,
        },
        "device_memory": {
            "weights_bytes": memory.weights_bytes,
            "state_bytes": memory.state_bytes,
            "kv_cache_bytes": memory.kv_cache_bytes,
            "activation_bytes": memory.activation_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "with_cuda_bytes": found.needed_bytes,
            "largest_allocation_bytes": memory.largest_allocation_bytes,
            "largest_allocation": found.largest,
        },
        "build_memory_bytes": found.build_bytes,
        "engine_bytes": found.engine_bytes,
        "devices": [
            {
                "name": device.name,
                "memory_bytes": device.memory_bytes,
                "fits": found.needed_bytes <= usable_bytes(device.memory_bytes, shared=device.shared_memory),
                "bandwidth_gb_s": device.bandwidth_gb_s,
                "most_tokens_per_s": round(found.tokens_per_second(device), 1),
            }
            for device in devices_of(plan)
        ],
        "findings": list(plan.findings),
    }


def plan_text(plan: EnginePlan) -> str:
    """Write a plan: what will be built, what it needs, how fast it can be at best."""
    data = plan_as_json(plan)
    memory = data["device_memory"]
    version = data["version"] or f"none here; planned for {data['assumed_version'] or 'any version'}"
    tokens, limits = data["profiles"]["prefill_tokens"], data["profiles"]
    head = [
        ("bundle", printable(data["bundle"])),
        ("target", f"{data['target']}, SM {', '.join(data['compute_capabilities'])}"),
        ("library", f"{data['flavor']} {version}"),
        ("precision", f"{data['precision']}, strongly typed; SSM states fp32"),
        ("prefill profile", f"{limits['max_batch']} rows, {tokens[0]} to {tokens[2]} tokens, typically {tokens[1]}"),
        ("decode profile", f"{limits['max_batch']} rows, 1 token"),
        ("vision profile", f"1 to {limits['max_tiles']} tiles"),
    ]
    if limits["max_tokens"]:
        head.append(("KV caches", f"{limits['max_tokens']} tokens"))
    parts = [
        ("weights", size(memory["weights_bytes"])),
        ("states", size(memory["state_bytes"])),
        ("KV caches", size(memory["kv_cache_bytes"])),
        ("activations, about", size(memory["activation_bytes"])),
        ("workspace", size(memory["workspace_bytes"])),
        ("in all, with CUDA", size(memory["with_cuda_bytes"])),
        ("largest allocation", f"{size(memory['largest_allocation_bytes'])}: {memory['largest_allocation']}"),
    ]
    devices = [("", "memory", "fits", "at most")]
    devices += [
        (
            each["name"],
            size(each["memory_bytes"]),
            "yes" if each["fits"] else "no",
            f"{each['most_tokens_per_s']:.0f} tokens/s at {each['bandwidth_gb_s']:g} GB/s",
        )
        for each in data["devices"]
    ]
    build = [
        ("memory of the builder, about", size(data["build_memory_bytes"])),
        ("engine on disk, about", size(data["engine_bytes"])),
    ]
    text = [f"plan\n{table(head, indent=2)}", f"device memory\n{table(parts, indent=2)}"]
    if data["devices"]:
        text.append(f"devices\n{table(devices, indent=2)}")
    text.append(f"build\n{table(build, indent=2)}")
    if data["findings"]:
        text.append("\n".join(["findings", *(_item(finding) for finding in data["findings"])]))
    return "\n\n".join(text)


def _item(text: str) -> str:
    return textwrap.fill(printable(text), WIDTH, initial_indent="  - ", subsequent_indent="    ")


def engine_summary(folder: Path, manifest: EngineManifest) -> str:
    """Say what a build wrote and what to do next."""
    total = sum(info.bytes for info in manifest.files.values())
    plans = ", ".join(f"{name} in {plan.build_seconds:.1f} s" for name, plan in manifest.plans.items())
    peak = max(plan.peak_bytes for plan in manifest.plans.values())
    lines = [
        f"wrote {folder}: {manifest.flavor} {manifest.tensorrt_version}, {manifest.dtype}, {size(total)} in "
        f"{len(manifest.files)} files",
        f"built {plans}; the builder took {size(peak)} of memory at most",
        f"next: mmm-export inspect {shlex.quote(str(folder))}",
    ]
    return "\n".join(lines)


def layer_table(parts: Mapping[str, Mapping[str, int]]) -> str:
    """Write the counts of layers of each part, "decoder.plan decode"."""
    kinds = list(dict.fromkeys(kind for counts in parts.values() for kind in counts))
    rows = [["", *kinds]]
    rows += [[part, *(str(counts.get(kind, 0)) for kind in kinds)] for part, counts in parts.items()]
    return table(rows, indent=2)


def layer_lines(layers: Mapping[str, list[dict[str, Any]]]) -> str:
    """Write every layer of every part."""
    lines: list[str] = []
    for part, rows in layers.items():
        lines.append(part)
        for row in rows:
            arrow = f"{' '.join(row['inputs'])} -> {' '.join(row['outputs'])}".strip()
            lines.append(printable(f"  {row['kind']} {row['name']}: {arrow}"))
    return "\n".join(lines)
