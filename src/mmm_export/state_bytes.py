"""How many bytes one sequence keeps between calls."""

from __future__ import annotations

from mmm_export.manifest import Dtype
from mmm_export.spec import ModelSpec

BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def state_bytes(spec: ModelSpec, dtype: Dtype) -> dict[str, int]:
    """Count the bytes one sequence keeps: SSM and conv states, which never grow, and the KV cache's growth by token."""
    recurrent = len(spec.mamba_layers)
    return {
        "ssm_bytes": recurrent * spec.heads * spec.head_dim * spec.state_dim * 4,
        "conv_bytes": recurrent * spec.conv_channels * (spec.conv_width - 1) * BYTES[dtype],
        "kv_bytes_per_token": len(spec.attention_layers) * 2 * spec.kv_heads * spec.head_dim * BYTES[dtype],
    }
