"""Settles all that a build depends on, and refuses what cannot work, before anything is lowered or built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from mmm_export import names
from mmm_export.engine_manifest import FLAVORS, Flavor
from mmm_export.errors import EngineError, OptionError
from mmm_export.exporter.trt.device import LocalDevice, local_device, machine_memory
from mmm_export.exporter.trt.estimate import MIB, Estimate, Sizes, estimate, refuse_unless_fits
from mmm_export.exporter.trt.libraries import Library, find_library, require_library
from mmm_export.exporter.trt.lowering import refuse_foreign_operators
from mmm_export.exporter.trt.number_formats import number_formats, refuse_unsupported
from mmm_export.exporter.trt.operators import Operators, Version, operators_of
from mmm_export.exporter.trt.profiles import ProfileOptions
from mmm_export.exporter.trt.quantized_form import refuse_other_form
from mmm_export.exporter.trt.targets import NAMES, RTX_CAPABILITIES, TARGETS, Device, Target, dotted, target_named
from mmm_export.manifest import Manifest, check_files, read_manifest

NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Attributes:
        target: name of a target, or "auto": what this machine has.
        flavor: library, or "auto": the target's.
        profiles: shapes that the engine takes.
        max_tokens: capacity of the KV caches, at most the bundle's; None for the bundle's.
        workspace_mib: most scratch memory of the builder.
        capabilities: compute capabilities of the engine; None for the target's.
        embed_plugin: put the plugin into the plan.
        timing_cache: file of tactic timings, read and written; not with TensorRT-RTX.
        max_alloc_mib: most that one part of the LM head may take; None for the target's limit, 0 for none.
        device_memory_mib: memory of the device; None for that of this machine's, or of the target's.
    """

    target: str = "auto"
    flavor: Literal["tensorrt", "tensorrt-rtx", "auto"] = "auto"
    profiles: ProfileOptions = dataclasses.field(default_factory=ProfileOptions)
    max_tokens: int | None = None
    workspace_mib: int = 2048
    capabilities: tuple[int, ...] | None = None
    embed_plugin: bool = False
    timing_cache: Path | None = None
    max_alloc_mib: int | None = None
    device_memory_mib: int | None = None

    def __post_init__(self) -> None:
        if self.target not in ("auto", *NAMES):
            target_named(self.target)  # raises
        if self.flavor not in ("auto", *FLAVORS):
            raise OptionError("unknown flavor", found=repr(self.flavor), wanted=f"{', '.join(FLAVORS)}, or auto")


@dataclass(frozen=True)
class EnginePlan:
    """All that is settled.

    Attributes:
        library: that builds; None in a dry run on a machine without it.
        version: of the library, or what the target has at least.
        device: the GPU here, if the engine is for it.
        findings: what a user should know.
    """

    bundle: Path
    manifest: Manifest
    options: EngineOptions
    target: Target
    flavor: Flavor
    library: Library | None
    version: Version
    operators: Operators
    capabilities: tuple[int, ...]
    device: LocalDevice | None
    sizes: Sizes
    estimate: Estimate
    findings: tuple[str, ...]


def plan_engine(bundle: Path, options: EngineOptions, *, dry_run: bool, check_content: bool = True) -> EnginePlan:
    """Read a bundle and settle a build.

    Args:
        bundle: a bundle folder.
        options: what was asked for.
        dry_run: a library need not be installed when the target is named.
        check_content: compare the files with their hashes.

    Raises:
        BundleError: the bundle is damaged.
        EngineError: library, device, number format or memory do not fit.
        OptionError: options contradict each other or the bundle.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, content=check_content)
    here = local_device()
    target, library = _target(options, here, dry_run=dry_run)
    flavor: Flavor = library.flavor if library else (target.flavor if options.flavor == "auto" else options.flavor)
    version = library.version if library else (target.oldest if flavor == target.flavor else ())
    _refuse_other_version(target, flavor, library)
    capabilities = _capabilities(options, target, flavor, here, dry_run=dry_run)
    formats: set[str] = set()
    for name in (names.DECODER_FILE, names.VISION_FILE):
        model = ir.load(bundle / name)
        refuse_foreign_operators(model, name)
        formats |= number_formats(model)
    refuse_unsupported(formats, capabilities, flavor, version)
    form_findings = refuse_other_form(manifest, flavor)
    if flavor == "tensorrt-rtx" and options.timing_cache is not None:
        raise OptionError(
            "--timing-cache is not for TensorRT-RTX",
            found=str(options.timing_cache),
            wanted="no timing cache: it chooses kernels on the device, when the engine is loaded",
        )
    operators = operators_of(flavor, version, manifest.dtype)
    alloc_mib = target.max_alloc_mib if options.max_alloc_mib is None else options.max_alloc_mib
    sizes = Sizes(
        options.profiles,
        _max_tokens(options, manifest),
        options.workspace_mib * MIB,
        alloc_mib * MIB if alloc_mib else NO_LIMIT,
    )
    found = estimate(manifest, sizes, operators)
    device = here if here is not None and here.capability in capabilities else None
    _refuse_too_large(manifest, sizes, operators, options, target, device)
    findings = [*manifest.findings, *form_findings, *_build_memory_findings(found, flavor, dry_run=dry_run)]
    if manifest.dtype == "fp32":
        findings.append("fp32 weights: an fp16 bundle takes half the memory and decodes twice as fast")
    return EnginePlan(
        bundle, manifest, options, target, flavor, library, version, operators, capabilities, device, sizes, found,
        tuple(findings),
    )  # fmt: skip


def devices_of(plan: EnginePlan) -> list[Device]:
    """Devices that a plan is shown for: the target's with one of the engine's compute capabilities."""
    return [device for device in plan.target.devices if device.capability in plan.capabilities]


def _target(options: EngineOptions, here: LocalDevice | None, *, dry_run: bool) -> tuple[Target, Library | None]:
    if options.target != "auto":
        target = target_named(options.target)
        flavor: Flavor = target.flavor if options.flavor == "auto" else options.flavor
        if flavor == "tensorrt-rtx" and target.machine == "aarch64":
            raise OptionError(
                f"target {target.name} has no TensorRT-RTX",
                found="--flavor tensorrt-rtx",
                wanted="--flavor tensorrt: TensorRT-RTX builds for GeForce and RTX cards",
            )
        return target, find_library(flavor) if dry_run else require_library(flavor)
    flavors: tuple[Flavor, ...] = FLAVORS if options.flavor == "auto" else (options.flavor,)
    # Without a GPU only TensorRT-RTX can build, so a TensorRT beside it must not be taken.
    if options.flavor == "auto" and here is None:
        flavors = ("tensorrt-rtx",)
    library = next((found for found in map(find_library, flavors) if found), None)
    if library is None:
        if options.flavor != "auto":
            require_library(options.flavor)  # raises
        raise EngineError(
            "no TensorRT was found that can build here",
            found="no GPU and no tensorrt-rtx" if here is None else "neither tensorrt nor tensorrt-rtx",
            wanted="tensorrt on the device itself, or tensorrt-rtx anywhere",
            hint=f"name the target to see a plan: --target {'|'.join(NAMES)} --dry-run",
        )
    return _matching_target(library, here), library


def _matching_target(library: Library, here: LocalDevice | None) -> Target:
    if library.flavor == "tensorrt-rtx":
        return target_named("rtx")
    if here is not None:
        for target in TARGETS:
            if target.capabilities == (here.capability,) and target.oldest <= library.version[:2] <= target.newest:
                return target
    return target_named("datacenter")


def _refuse_other_version(target: Target, flavor: Flavor, library: Library | None) -> None:
    if library is None or flavor != target.flavor:
        return
    if not target.oldest <= library.version[:2] <= target.newest:
        oldest, newest = (".".join(map(str, version)) for version in (target.oldest, target.newest))
        raise EngineError(
            f"target {target.name} runs another {flavor} than the one here",
            found=f"{flavor} {library.version_text}",
            wanted=f"{oldest} or newer" if target.newest[1] == 99 else f"{oldest} to {newest}",
            hint="an engine runs only on the version that built it: build on the device, or choose another --target",
        )


def _capabilities(
    options: EngineOptions, target: Target, flavor: Flavor, here: LocalDevice | None, *, dry_run: bool
) -> tuple[int, ...]:
    if flavor == "tensorrt-rtx":
        wanted = options.capabilities or tuple(n for n in target.capabilities if n in RTX_CAPABILITIES)
        foreign = [number for number in wanted if number not in RTX_CAPABILITIES]
        if foreign or not wanted:
            raise OptionError(
                "TensorRT-RTX does not build for this compute capability",
                found=", ".join(map(dotted, foreign)) or "none",
                wanted=", ".join(map(dotted, RTX_CAPABILITIES)),
                hint="use --flavor tensorrt on the device itself",
            )
        return wanted
    if here is None:
        if dry_run:
            return options.capabilities or target.capabilities
        raise EngineError(
            "TensorRT builds on the device itself, and this machine shows no GPU",
            found="no answer from nvidia-smi, and no Jetson",
            wanted=f"a device of target {target.name}",
            hint="run it there; --dry-run shows the plan here, and --flavor tensorrt-rtx builds without a GPU",
        )
    wanted = options.capabilities or ((here.capability,) if not dry_run else target.capabilities)
    if not dry_run and wanted != (here.capability,):
        raise OptionError(
            "TensorRT builds for the GPU that it runs on alone",
            found=f"--compute-capability {', '.join(map(dotted, wanted))}",
            wanted=f"{dotted(here.capability)}, that of {here.name}",
            hint="leave --compute-capability out, or build on the other device",
        )
    if not dry_run and here.capability not in target.capabilities and target.machine:
        raise EngineError(
            f"this device is not of target {target.name}",
            found=f"{here.name}, SM {dotted(here.capability)}",
            wanted=", ".join(f"SM {dotted(number)}" for number in target.capabilities),
            hint="choose another --target, or auto",
        )
    return wanted


def _max_tokens(options: EngineOptions, manifest: Manifest) -> int:
    if not manifest.model.attention_layers:
        return 0
    capacity = options.max_tokens or manifest.max_tokens
    if capacity > manifest.max_tokens:
        raise OptionError(
            "--max-tokens is more than the bundle's KV caches hold",
            found=str(capacity),
            wanted=f"at most {manifest.max_tokens}",
            hint=f"export the bundle with --max-tokens {capacity}",
        )
    if options.profiles.prefill_tokens[2] > capacity:
        raise OptionError(
            "--prefill-tokens is longer than the KV caches",
            found=str(options.profiles.prefill_tokens[2]),
            wanted=f"at most {capacity} tokens",
            hint="lower --prefill-tokens, or raise --max-tokens",
        )
    return capacity


def _refuse_too_large(
    manifest: Manifest,
    sizes: Sizes,
    operators: Operators,
    options: EngineOptions,
    target: Target,
    device: LocalDevice | None,
) -> None:
    shared = target.machine == "aarch64"
    if options.device_memory_mib is not None:
        memory, name = options.device_memory_mib * MIB, "the device"
    elif device is not None:
        memory, name, shared = device.memory_bytes, device.name, device.shared_memory
    else:
        largest = max(target.devices, key=lambda each: each.memory_bytes)
        memory, name = (
            largest.memory_bytes,
            f"any device of target {target.name}, the largest of which is {largest.name}",
        )
    refuse_unless_fits(manifest, sizes, operators, memory, shared=shared, device=name)


def _build_memory_findings(found: Estimate, flavor: Flavor, *, dry_run: bool) -> list[str]:
    """Say that the build may not fit this machine; refuse it where the need was measured, which is with TensorRT-RTX."""
    total, free = machine_memory()
    if not total or dry_run:
        return []
    needed = f"{found.build_bytes / 2**30:.1f} GiB"
    if found.build_bytes > total and flavor == "tensorrt-rtx":
        raise EngineError(
            "this machine has too little memory to build the engine",
            found=f"{total / 2**30:.1f} GiB with swap",
            wanted=f"about {needed}",
            hint="add swap space, or build on a larger machine: the engine is for the GPU, not for the machine that builds",
        )
    if found.build_bytes > free:
        return [
            f"the build needs about {needed} of memory and {free / 2**30:.1f} GiB are free with swap: close other programs, "
            "or add swap space"
        ]
    return []
