"""How far the kernels may be from float64, and a table of how far they were.

Errors are ||found - wanted|| / ||wanted|| over the whole tensor (in float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpu.calls import Call
from gpu.kernels import DTYPES
from gpu.reference import Result, mixer

# The error of y. The Triton kernels of mamba-ssm are 2.5e-3 from float64 in bf16 on these inputs at 384 tokens (benchmarks,
# prefill_error): inputs rounded for the matrix units (2**-9 / sqrt(3) relative, on average), and the result once more. Over one or
# two tokens the average is over few numbers: a tenth more. fp16 has three bits more: an eighth of it, and as much again for sums
# of few terms. fp32 kernels sum some hundred products of relative error 6e-8.
BOUND = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2.8e-3}

# Against unrounded operands the roundings of v, k and q count too. They are relative to the largest terms of a sum, and the norm
# scales up a head whose terms cancelled, errors included: most in small heads (64x64) and with fast decays.
EXACT_BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}

# One rounding to the type of a stored state, relative to the norm: 2**-(p+1) / sqrt(3) / 0.72 for normally distributed
# entries and a mantissa of p bits, with a fifth of margin.
STORED = {torch.float32: 0.0, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}


@dataclass
class Worst:
    cases: int = 0
    y: float = 0.0
    y_exact: float = 0.0
    state: float = 0.0
    where: str = ""


TABLE: dict[tuple[str, str, str], Worst] = {}


def relative_l2(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """0 when both are all zeros; NaN and infinities in `found` give inf."""
    difference = float((found.double() - wanted.double()).norm())
    reference = float(wanted.double().norm())
    if difference == 0:
        return 0.0
    error = difference / reference if reference else math.inf
    return error if math.isfinite(error) else math.inf


def check(
    call: Call, group: str, *, rounded: Result | None = None, exact: Result | None = None, extreme: bool = False
) -> None:
    """Assert that a call's outputs are within the bounds, and note its errors in the table under `group`.

    Matrix units take v, k and q rounded to the I/O type; kernels without them need not round. Either is right, so y and the
    state must meet the tight bound against one of the two references, and the loose one against exact operands.

    Args:
        call: that has run.
        group: the line of the table.
        rounded: the reference with rounded operands, where the caller has it already.
        exact: the reference with exact operands, likewise.
        extreme: inputs so large that rounded operands are another problem: only its own reference counts.
    """
    io, state_type = call.inputs.projected.dtype, call.inputs.ssm_state.dtype
    exact = exact or mixer(call.inputs)
    rounded = rounded or (exact if io == torch.float32 else mixer(call.inputs, operands=io))
    y, conv_state, state = call.outputs

    assert torch.equal(conv_state, exact.conv_state), "the conv state is not the last raw inputs"
    valid = torch.arange(y.shape[1], device=y.device) < call.inputs.valid()[:, None]
    assert not y[~valid].any(), "y is not zero past the lengths"

    y_exact = relative_l2(y, exact.y)
    y_error = min(y_exact, relative_l2(y, rounded.y))
    state_error = min(relative_l2(state, exact.ssm_state), relative_l2(state, rounded.ssm_state))
    _note(call, group, y_error, y_exact, state_error)
    state_bound = math.hypot(BOUND[io], STORED[state_type])
    assert y_error <= BOUND[io], f"y: error {y_error:.2e}, wanted at most {BOUND[io]:.1e}"
    assert extreme or y_exact <= EXACT_BOUND[io], (
        f"y, exact operands: error {y_exact:.2e}, wanted at most {EXACT_BOUND[io]:.1e}"
    )
    assert state_error <= state_bound, f"state: error {state_error:.2e}, wanted at most {state_bound:.1e}"


def _note(call: Call, group: str, y: float, y_exact: float, state: float) -> None:
    io = str(call.inputs.projected.dtype).removeprefix("torch.")
    worst = TABLE.setdefault((group, io, call.method.name.lower()), Worst())
    if y > worst.y:
        s = call.inputs.sizes
        worst.where = (
            f"B={s.batch} T={s.tokens} {s.heads}/{s.kv_heads} heads {s.head_dim}x{s.state_dim} K={s.conv_width}"
        )
    worst.cases += 1
    worst.y = max(worst.y, y)
    worst.y_exact = max(worst.y_exact, y_exact)
    worst.state = max(worst.state, state)


def table_lines() -> list[str]:
    """The worst error of each group, type and method, for the end of a run."""
    if not TABLE:
        return []
    lines = [f"{'what':26s} {'type':9s} {'method':10s} calls  y (bound)          y, exact  state    worst y at"]
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    for (group, io, method), worst in sorted(TABLE.items()):
        lines.append(
            f"{group:26s} {io:9s} {method:10s} {worst.cases:5d}  {worst.y:.1e} ({BOUND[names[io]]:.1e})  "
            f"{worst.y_exact:.1e}   {worst.state:.1e}  {worst.where}"
        )
    return lines
