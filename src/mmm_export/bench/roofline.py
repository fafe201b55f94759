"""The least time of a decode step: every weight and the state must pass through the memory once."""

from __future__ import annotations

import time

import numpy as np

from mmm_export import names
from mmm_export.engine_manifest import EngineManifest
from mmm_export.manifest import Manifest
from mmm_export.state_bytes import state_bytes


def step_bytes(manifest: Manifest | EngineManifest, context_tokens: int, batch: int = 1) -> int:
    """Count the bytes that a decode step moves at least.

    The decoder's weights are read once for all sequences. Of each sequence a row of KV cache for every token of its context is
    read, and SSM and conv states are read and written.
    """
    if isinstance(manifest, EngineManifest):
        weights = manifest.files[names.DECODER_PLAN].bytes  # a plan is little else
    else:
        weights = sum(
            info.bytes
            for name, info in manifest.files.items()
            if name.startswith(names.DECODER_FILE) and name != names.DECODER_FILE
        )
    state = state_bytes(manifest.model, manifest.dtype)
    each = 2 * (state["ssm_bytes"] + state["conv_bytes"]) + context_tokens * state["kv_bytes_per_token"]
    return weights + batch * each


def host_bandwidth(size: int = 256 << 20, repeats: int = 5) -> float:
    """Measure the best rate, in bytes read plus bytes written a second, at which this machine copies memory."""
    source = np.ones(size // 8)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best
