"""Times what others offer for the same mixer: the kernels of a benchmark kit with mamba-ssm's Triton operators.

The kit is a folder with `bench.py` (mmMamba's shapes), `tk.py` (causal convolution and gated norm in Triton) and the
package `mamba_ssm`. Decode is the whole mixer, five kernels in one graph. Prefill is the sum of the scan, the convolution and
the best gated norm, each timed alone; the copies that repeat k and v for each head are left out, which favours the peers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.bounds import relative_l2
from gpu.inputs import Inputs, Sizes, draw
from gpu.reference import mixer
from gpu_timing import CUDA, Timing, eager_time, graph_time, hot_time, rotation

Row = dict[str, Any]
GRAPH_TOKENS = 20_000  # beyond, launches no longer matter and a graph would hold gigabytes of intermediates
ERROR_TOKENS = 384 if CUDA else 64


class Kit:
    """The modules of the benchmark kit."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder.resolve()))
        import bench  # type: ignore[import-not-found]
        import tk  # type: ignore[import-not-found]

        self.bench, self.tk = bench, tk

    def scan(self, i: dict[str, torch.Tensor], a: torch.Tensor, dt_bias: torch.Tensor) -> Any:
        b = self.bench
        return b.mamba_chunk_scan_combined(
            *(i["x"], i["dt"], a, i["B"], i["C"], b.CHUNK), dt_bias=dt_bias, dt_softplus=True, return_final_states=True
        )

    def prefill(self, inputs: Inputs) -> torch.Tensor:
        """Return y (1, T, H*P) of the peers' whole prefill, from zero states."""
        b, s = self.bench, inputs.sizes
        rows = inputs.projected[0]
        weight, bias = inputs.conv_weight.to(torch.bfloat16), inputs.conv_bias.to(torch.bfloat16)
        u, _ = self.tk.conv2(rows[:, : b.CONV], weight, bias)
        v, k, q = u.split([b.DKV, b.DKV, b.DQ], -1)  # type: ignore[no-untyped-call]
        parts = {
            "x": v.view(1, -1, s.kv_heads, s.head_dim).repeat_interleave(2, 2),
            "B": k.view(1, -1, s.kv_heads, s.state_dim).repeat_interleave(2, 2),
            "C": q.view(1, -1, s.heads, s.state_dim),
            "dt": rows[None, :, b.CONV + b.DQ :],
        }
        y, _ = self.scan(parts, -torch.exp(inputs.A_log), inputs.dt_bias)
        gate = rows[:, b.CONV : b.CONV + b.DQ]
        normed: torch.Tensor = self.tk.gnorm(y.view(-1, b.DQ), gate, inputs.norm_weight.to(torch.bfloat16))
        return normed[None]


def decode_rows(kit: Kit) -> Iterator[Row]:
    """Yield the whole decode mixer of five kernels, with fp32 states."""
    b = kit.bench
    constants = b.dec_consts()
    weight, bias, norm = b.rnd(b.CONV, 2, k=0.5), b.rnd(b.CONV, k=0.1), torch.ones(b.P, device=b.DEV, dtype=b.BF)
    for batch in (1, 2, 4, 8):
        count = rotation(batch * b.H * b.P * b.N * 8, most=96)
        sets = [
            {"p": b.rnd(batch, b.DPROJ), "conv": b.rnd(batch, b.CONV), "ssm": b.rnd(batch, b.H, b.P, b.N, dt=b.F32)}
            for _ in range(count)
        ]

        def work(i: int, sets: list[dict[str, torch.Tensor]] = sets, batch: int = batch) -> torch.Tensor:
            p = sets[i]["p"]
            u = kit.tk.conv2_update(p[:, : b.CONV], weight, bias, sets[i]["conv"])
            v = u[:, : b.DKV].view(batch, b.KV, b.P).repeat_interleave(2, 1)
            k = u[:, b.DKV : 2 * b.DKV].view(batch, b.KV, b.N).repeat_interleave(2, 1)
            q = u[:, 2 * b.DKV :].view(batch, b.H, b.N)
            dt = p[:, b.CONV + b.DQ :][:, :, None].expand(-1, -1, b.P)
            c = constants
            y = b.selective_state_update(sets[i]["ssm"], v, dt, c["A"], k, q, c["D"], None, c["dtb"], True)
            out: torch.Tensor = kit.tk.gnorm(y.view(batch, b.DQ), p[:, b.CONV : b.CONV + b.DQ], norm)
            return out

        cold, hot = graph_time(work, count, per_graph=32), hot_time(work)
        yield _row("decode_mixer", batch, 1, peer_us=cold.us, peer_spread_us=cold.spread_us, peer_hot_us=hot.us)


def prefill_rows(kit: Kit, tokens: Sequence[int]) -> Iterator[Row]:
    """Yield scan, convolution and gated norm of one sequence, and their sum."""
    b = kit.bench
    a, dt_bias = b.ssd_consts()
    weight, bias = b.rnd(b.CONV, 2, k=0.5), b.rnd(b.CONV, k=0.1)
    norm = torch.ones(b.P, device=b.DEV, dtype=b.BF)
    compiled = torch.compile(b.gnorm_eager, dynamic=True) if CUDA else b.gnorm_eager
    tuned_at = 0
    for count in tokens:
        stage = 1024 if count <= 2048 else 16_384  # the autotuner's keys hold no length: tune once for each range
        if stage != tuned_at:
            if CUDA:
                b.retune()
            kit.scan(b.ssd_inputs(stage if CUDA else 64), a, dt_bias)
            tuned_at = stage
        sets = [b.ssd_inputs(count) for _ in range(rotation(b.ssd_bytes(count) * 1.3, most=40))]
        scan = _time(lambda i, sets=sets: kit.scan(sets[i], a, dt_bias), len(sets), count)
        del sets
        rows = [b.rnd(count, b.DPROJ) for _ in range(rotation(count * b.DPROJ * 2, most=40))]
        ys = [b.rnd(count, b.DQ) for _ in rows]
        conv = _time(lambda i, rows=rows: kit.tk.conv2(rows[i][:, : b.CONV], weight, bias)[0], len(rows), count)
        gates = [row[:, b.CONV : b.CONV + b.DQ] for row in rows]
        ways: dict[str, Callable[[int], Any]] = {
            "triton": lambda i, ys=ys, gates=gates: kit.tk.gnorm(ys[i], gates[i], norm),
            "torch.compile": lambda i, ys=ys, gates=gates: compiled(ys[i], gates[i], norm),
            "mamba-ssm": lambda i, ys=ys, gates=gates: b.rmsnorm_fn(
                ys[i], norm.repeat(b.H), None, z=gates[i], eps=1e-5, group_size=b.P, norm_before_gate=True
            ),
        }
        norms = {}
        for name, way in ways.items():
            try:
                norms[name] = _time(way, len(rows), count)
            except Exception as error:  # one of the three is enough
                sys.stderr.write(f"gated norm by {name}, T={count}: {str(error)[:160]}\n")
        best = min(norms, key=lambda name: norms[name].us)
        yield _row(
            *("prefill_mixer", 1, count),
            peer_us=scan.us + conv.us + norms[best].us,
            peer_spread_us=scan.spread_us + conv.spread_us + norms[best].spread_us,
            peer_scan_us=scan.us,
            peer_conv_us=conv.us,
            peer_norm_us=norms[best].us,
            peer_norm=best,
        )
        del rows, ys, gates, ways
        if CUDA:
            torch.cuda.empty_cache()


def error_row(kit: Kit, kernels: Any) -> Row:
    """Compute the errors of ours and of the peers on the same rows, against float64 with exact operands."""
    from dataclasses import replace

    from gpu.calls import run

    inputs = draw(Sizes(1, ERROR_TOKENS), torch.bfloat16)
    rounded = {n: getattr(inputs, n).to(torch.bfloat16).float() for n in ("conv_weight", "conv_bias", "norm_weight")}
    zeros = {n: torch.zeros_like(getattr(inputs, n)) for n in ("conv_state", "ssm_state")}
    inputs = replace(inputs, **rounded, **zeros)
    exact, operands = mixer(inputs).y, mixer(inputs, operands=torch.bfloat16).y
    ours, peers = run(kernels, inputs).y.tensor, kit.prefill(inputs)
    return {
        "name": "prefill_error",
        "batch": 1,
        "tokens": ERROR_TOKENS,
        "dtype": "bf16",
        "state_dtype": "fp32",
        "ours_error_exact": relative_l2(ours, exact),
        "ours_error": relative_l2(ours, operands),
        "peer_error_exact": relative_l2(peers, exact),
        "peer_error": relative_l2(peers, operands),
    }


def _row(name: str, batch: int, tokens: int, **figures: Any) -> Row:
    return {"name": name, "batch": batch, "tokens": tokens, "dtype": "bf16", "state_dtype": "fp32", **figures}


def _time(work: Callable[[int], object], sets: int, tokens: int) -> Timing:
    return graph_time(work, sets) if tokens <= GRAPH_TOKENS else eager_time(work, sets)
