"""What an engine will need and how fast it can be at best, before anything is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmm_export import names
from mmm_export.engine_manifest import DeviceMemory
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.head import head_parts
from mmm_export.exporter.trt.operators import Operators
from mmm_export.exporter.trt.profiles import ProfileOptions, profile_rows
from mmm_export.exporter.trt.targets import GIB, Device
from mmm_export.manifest import Manifest
from mmm_export.state_bytes import BYTES, state_bytes

MIB = 1 << 20

# Device memory that CUDA and the engine's kernels take before anything of ours: 300 to 500 MiB on current drivers.
CONTEXT_BYTES = 512 * MIB
# On a device whose memory the processor shares, the system and its services hold this much of it.
SYSTEM_BYTES = GIB
# The scan bounds its workspace itself (plugins/kernels/chunked.cu); engines run layers in turn, so it counts once.
SCAN_WORKSPACE_BYTES = 21_000_000
# Resident memory of the builder over the bytes of weights, TensorRT-RTX writing the plan as a stream: 2.3 in
# benchmarks/results/rtx-engines.json. Below it lies the library itself.
BUILD_FACTOR = 2.5
BUILD_BASE_BYTES = 1 * GIB


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on besides the bundle."""

    profiles: ProfileOptions
    max_tokens: int  # capacity of the KV caches; 0 without attention layers
    workspace_bytes: int  # limit given to the builder
    max_alloc_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Expectation for one bundle and set of sizes.

    Attributes:
        memory: on the device, by part.
        largest: what the largest single allocation is.
        build_bytes: of the building machine's memory.
        engine_bytes: of all files.
        step_bytes: read and written by one decode step at the largest batch with full caches.
        batch: rows of that step.
    """

    memory: DeviceMemory
    largest: str
    build_bytes: int
    engine_bytes: int
    step_bytes: int
    batch: int

    @property
    def needed_bytes(self) -> int:
        """Device memory including what CUDA takes."""
        return self.memory.total_bytes + CONTEXT_BYTES

    def tokens_per_second(self, device: Device) -> float:
        """No decoding can be faster: every step moves `step_bytes` through the memory."""
        return self.batch * device.bandwidth_gb_s * 1e9 / self.step_bytes


def estimate(manifest: Manifest, sizes: Sizes, operators: Operators) -> Estimate:
    """Count the bytes of an engine.

    Weights, states and caches are counted; activations are the widest tensors of a layer that live at a time, which a builder may
    better or miss.
    """
    spec, options = manifest.model, sizes.profiles
    item = BYTES[manifest.dtype]
    batch, tokens = options.max_batch, options.prefill_tokens[2]
    decoder, vision = (_weight_bytes(manifest, name) for name in (names.DECODER_FILE, names.VISION_FILE))
    parts = head_parts(spec.hidden_size, spec.vocab_size, item, sizes.max_alloc_bytes)
    state = state_bytes(spec, manifest.dtype)
    # The plain form gets two buffers that swap; the other writes the cache in place.
    copies = 1 if operators.cached_attention else 2
    cache = state["kv_bytes_per_token"] * sizes.max_tokens * batch
    # The conv state is held twice: two readers share a row, so it cannot be written where it is read.
    states = (state["ssm_bytes"] + 2 * state["conv_bytes"]) * batch
    scores = 0
    if spec.attention_layers and not operators.cached_attention:
        scores = spec.heads * tokens * sizes.max_tokens * (4 + item)  # plain attention writes its scores out, twice
    layer = tokens * max(3 * spec.intermediate_size, spec.projected_size + 2 * spec.hidden_size) * item
    tile = spec.vision.grid**2 * spec.hidden_size * item * 4
    rows = profile_rows(options)
    activations = max(rows * (layer + scores + 4 * tokens * spec.hidden_size), options.max_tiles * tile)
    activations += rows * spec.vocab_size * (4 + item)
    allocations = {
        "the LM head, or a part of it": max(part.end - part.begin for part in parts) * spec.hidden_size * item,
        "a projection": spec.hidden_size * max(spec.intermediate_size, spec.projected_size) * item,
        "the KV cache of a layer": spec.kv_heads * spec.head_dim * sizes.max_tokens * batch * item
        if spec.attention_layers
        else 0,
        "the activations": activations,
    }
    largest = max(allocations, key=lambda name: allocations[name])
    workspace = min(sizes.workspace_bytes, SCAN_WORKSPACE_BYTES) if spec.mamba_layers else 0
    memory = DeviceMemory(decoder + vision, states, copies * cache, activations, workspace, allocations[largest])
    rewrites = (
        1 if operators.cached_attention else 3
    )  # the plain form reads and writes a cache whole, besides reading it
    step = decoder + 2 * (state["ssm_bytes"] + state["conv_bytes"]) * batch + rewrites * cache
    table = (spec.vocab_size + spec.special_tokens) * spec.hidden_size * item
    build = BUILD_BASE_BYTES + int(BUILD_FACTOR * decoder)
    return Estimate(memory, largest, build, decoder + vision + table + 16 * MIB, step, batch)


def _weight_bytes(manifest: Manifest, name: str) -> int:
    return manifest.files[name + names.WEIGHTS_SUFFIX].bytes


def usable_bytes(memory_bytes: int, *, shared: bool) -> int:
    """Device memory that one program can have."""
    return max(memory_bytes - (SYSTEM_BYTES if shared else 0), 0)


def refuse_unless_fits(
    manifest: Manifest, sizes: Sizes, operators: Operators, memory_bytes: int, *, shared: bool, device: str
) -> None:
    """Raise EngineError when an engine cannot fit the device, naming what would make it fit."""
    found = estimate(manifest, sizes, operators)
    usable = usable_bytes(memory_bytes, shared=shared)
    if found.needed_bytes <= usable:
        return
    less = "; ".join(_ways_to_fit(manifest, sizes, operators, usable))
    raise EngineError(
        f"the engine cannot fit into the memory of {device}",
        found=f"{_gib(found.needed_bytes)} needed: weights {_gib(found.memory.weights_bytes)}, states "
        f"{_gib(found.memory.state_bytes)}, KV caches {_gib(found.memory.kv_cache_bytes)}, activations "
        f"{_gib(found.memory.activation_bytes)}, CUDA {_gib(CONTEXT_BYTES)}",
        wanted=f"at most {_gib(usable)}" + (", since the system shares the memory" if shared else ""),
        hint=less or "take a device with more memory; even one row and one token at a time do not fit here",
    )


def _ways_to_fit(manifest: Manifest, sizes: Sizes, operators: Operators, usable: int) -> list[str]:
    """Name single changes that suffice, else all of them together."""

    def fits(changed: Sizes) -> bool:
        return estimate(manifest, changed, operators).needed_bytes <= usable

    def with_profiles(**changes: object) -> Sizes:
        return dataclasses.replace(sizes, profiles=dataclasses.replace(sizes.profiles, **changes))  # type: ignore[arg-type]

    ways: list[str] = []
    for batch in range(sizes.profiles.max_batch - 1, 0, -1):
        if fits(with_profiles(max_batch=batch)):
            ways.append(f"it fits with --max-batch {batch}")
            break
    tokens = sizes.profiles.prefill_tokens[2]
    while tokens > 64:
        tokens //= 2
        if fits(with_profiles(prefill_tokens=(1, tokens, tokens))):
            ways.append(f"it fits with --prefill-tokens 1,{tokens},{tokens}")
            break
    capacity = sizes.max_tokens
    while capacity > 256:
        capacity //= 2
        if fits(dataclasses.replace(sizes, max_tokens=capacity)):
            ways.append(f"it fits with --max-tokens {capacity}")
            break
    for tiles in range(sizes.profiles.max_tiles - 1, 0, -1):
        if fits(with_profiles(max_tiles=tiles)):
            ways.append(f"it fits with --max-tiles {tiles}")
            break
    if not ways:
        least = with_profiles(max_batch=1, prefill_tokens=(1, 64, 64), max_tiles=1)
        least = dataclasses.replace(least, max_tokens=min(sizes.max_tokens, 256))
        if fits(least):
            ways.append("lower --max-batch, --prefill-tokens, --max-tokens and --max-tiles together")
    if manifest.dtype == "fp32":
        ways.append("export the bundle with --dtype fp16, which halves the weights")
    return ways


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
