"""The operands of a selective scan by name: which shapes belong together. Knows no array library, so that all can use it."""

from __future__ import annotations

from collections.abc import Mapping

from mmm_export.errors import KernelError
from mmm_export.plugins.library import ABI_VERSION, Device, DType, Method, ScanShape

WEIGHTS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight")


def scan_shape_from_operands(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kv_heads: int,
    eps: float,
    device: Device,
    io_dtype: DType,
    state_dtype: DType,
    method: Method = Method.AUTO,
) -> ScanShape:
    """Derive the sizes of a call from the shapes of its operands, and check that all of them agree.

    Args:
        shapes: of projected (B, T, W), conv_state (B, C, K-1), ssm_state (B, H, P, N), the five weights and, if given, lengths.
        kv_heads: G; H is a multiple of it.
        eps: of the RMS norm.
        device: where the operands lie.
        io_dtype: of projected and conv_state.
        state_dtype: of ssm_state.
        method: how the recurrence is computed.

    Raises:
        KernelError: an operand's shape is wrong. Sizes that no kernel takes are left to the library.
    """
    for name, rank in (("projected", 3), ("conv_state", 3), ("ssm_state", 4)):
        if len(shapes[name]) != rank:
            raise KernelError(f"{name} has {len(shapes[name])} axes", wanted=f"{rank}")
    B, T, _ = shapes["projected"]
    _, H, P, N = shapes["ssm_state"]
    K = shapes["conv_state"][2] + 1
    C = kv_heads * (P + N) + H * N
    wanted = {
        "projected": (B, T, C + H * P + H),
        "lengths": (B,),
        "conv_state": (B, C, K - 1),
        "ssm_state": (B, H, P, N),
        "conv_weight": (C, K),
        "conv_bias": (C,),
        "dt_bias": (H,),
        "A_log": (H,),
        "norm_weight": (P,),
    }
    for name, shape in shapes.items():
        if tuple(shape) != wanted[name]:
            sizes = f"B={B}, T={T}, H={H}, kv_heads={kv_heads}, P={P}, N={N}, K={K}"
            raise KernelError(
                f"{name} has the wrong shape", found=str(tuple(shape)), wanted=f"{wanted[name]} for {sizes}"
            )
    return ScanShape(
        abi_version=ABI_VERSION,
        device=device,
        io_dtype=io_dtype,
        state_dtype=state_dtype,
        batch=B,
        tokens=T,
        heads=H,
        kv_heads=kv_heads,
        head_dim=P,
        state_dim=N,
        conv_width=K,
        eps=eps,
        method=method,
    )
