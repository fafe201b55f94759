"""The whole model once more, in torch's own float64 operators and without a loop over tokens.

The scan is one T x T matrix per head, attention is torch's, RoPE multiplies complex numbers, images go through conv2d,
interpolate and pixel_unshuffle. Where it agrees with the oracle, a slip in either would have to be in both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracle_checks.tiny_checkpoint import IMAGE_TOKEN, Sizes

Weights = dict[str, torch.Tensor]


def scan_matrix(
    v: torch.Tensor, k: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over all earlier tokens at once, with cumulative decays. Shapes as in oracle.scan."""
    log = torch.cumsum(delta * a, dim=1).transpose(1, 2)  # (B, H, T)
    tokens = v.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    decays = torch.exp((log[..., :, None] - log[..., None, :]).masked_fill(~lower, -torch.inf))
    weighted = torch.einsum("bthn,bshn->bhts", q, k) * decays
    y = torch.einsum("bhts,bsh,bshp->bthp", weighted, delta, v)
    y = y + torch.einsum("bht,bhpn,bthn->bthp", torch.exp(log), state, q)
    to_end = torch.exp(log[..., -1:] - log)
    last = torch.einsum("bhs,bsh,bshp,bshn->bhpn", to_end, delta, v, k)
    return y, last + torch.exp(log[..., -1])[..., None, None] * state


def mamba2_matrix(u: torch.Tensor, w: Weights, sizes: Sizes) -> torch.Tensor:
    """Mixer of u (B, T, hidden) from zero states."""
    heads, kv, size = sizes.heads, sizes.kv_heads, sizes.head_dim
    channels = (heads + 2 * kv) * size
    vkq, gate, dt = torch.split(F.linear(u, w["wvkqgdt.weight"]), [channels, heads * size, heads], dim=-1)
    kernel = w["conv1d.weight"]
    padded = F.pad(vkq.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    vkq = F.silu(F.conv1d(padded, kernel, w["conv1d.bias"], groups=channels)).transpose(1, 2)
    v, k, q = torch.split(vkq, [kv * size, kv * size, heads * size], dim=-1)
    v = torch.unflatten(v, -1, (kv, size)).repeat_interleave(heads // kv, dim=2)
    k = torch.unflatten(k, -1, (kv, size)).repeat_interleave(heads // kv, dim=2)
    zeros = torch.zeros(u.shape[0], heads, size, size, dtype=u.dtype)
    delta = F.softplus(dt + w["dt_bias"])
    y, _ = scan_matrix(v, k, torch.unflatten(q, -1, (heads, size)), delta, -torch.exp(w["A_log_bias"]), zeros)
    y = F.rms_norm(y, (size,), w["g_norm_swish_gate.weight"], 1e-5) * F.silu(torch.unflatten(gate, -1, (heads, size)))
    return F.linear(y.flatten(2), w["o_proj.weight"])


def turn(x: torch.Tensor, theta: float, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as a product of complex numbers: dimension i is the real part, i + D/2 the imaginary one. x (..., T, D)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.polar(torch.ones(len(positions), half, dtype=torch.float64), torch.outer(positions, frequencies))
    turned = torch.complex(x[..., :half], x[..., half:]) * phase
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention_sdpa(u: torch.Tensor, w: Weights, sizes: Sizes, theta: float, stretch: float = 1.0) -> torch.Tensor:
    """Mixer of u (B, T, hidden) from an empty KV cache; positions are divided by `stretch`."""
    heads, kv, size = sizes.heads, sizes.kv_heads, sizes.head_dim
    group = heads // kv
    rows = torch.split(w["wqkv.weight"], size)  # blocks of one head each: group queries, a key, a value, and so on
    of_q = [rows[j * (group + 2) + i] for j in range(kv) for i in range(group)]
    of_k = [rows[j * (group + 2) + group] for j in range(kv)]
    of_v = [rows[j * (group + 2) + group + 1] for j in range(kv)]
    q, k, v = (torch.stack([F.linear(u, block) for block in blocks], dim=1) for blocks in (of_q, of_k, of_v))
    positions = torch.arange(u.shape[1], dtype=torch.float64) / stretch
    q, k = turn(q, theta, positions), turn(k, theta, positions)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), w["wo.weight"])


def image_features(pixels: torch.Tensor, w: Weights, sizes: Sizes) -> torch.Tensor:
    """(tiles, 3, S, S) -> (tiles * tokens per tile, hidden)."""
    part = "embedding_model.vision_embeddings."
    grid = F.conv2d(pixels, w[part + "patch_embedding.weight"], w[part + "patch_embedding.bias"], stride=sizes.patch)
    positions = w[part + "position_embedding"][:, 1:].transpose(1, 2).reshape(1, -1, sizes.grid, sizes.grid)
    grid = grid + F.interpolate(positions, size=grid.shape[-2:], mode="bicubic", align_corners=False)
    # pixel_unshuffle orders channels (D, row, column); the model wants (row, column, D).
    merged = torch.unflatten(F.pixel_unshuffle(grid, sizes.shuffle), 1, (sizes.hidden, sizes.shuffle**2))
    tokens = merged.permute(0, 3, 4, 2, 1).flatten(3)
    proj = "embedding_model.pixel_shuffle_proj."
    inner = F.gelu(F.linear(tokens, w[proj + "0.weight"], w[proj + "0.bias"]))
    return F.linear(inner, w[proj + "2.weight"], w[proj + "2.bias"]).flatten(0, 2)


def run_model(
    w: Weights, config: dict[str, Any], sizes: Sizes, ids: torch.Tensor, pixels: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (T, vocab) and the output (T, hidden) of every layer for ids (T,)."""
    table = w["embedding_model.llm_text_embeddings.weight"]
    if sizes.special:
        table = torch.cat([table, w["embedding_model.special_text_embeddings.weight"]])
    x = F.embedding(ids, table)
    if pixels is not None:
        x = x.masked_scatter((ids == IMAGE_TOKEN)[:, None], image_features(pixels, w, sizes))
    outputs = []
    for part, stack in (("embedding_config", "embedding_model.encoder"), ("llm_config", "language_model.model.layers")):
        for i, kind in enumerate(sizes.kinds[part == "llm_config"]):
            prefix = f"{stack}.{i}."
            own = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
            mixer = {n.removeprefix("attention."): v for n, v in own.items() if n.startswith("attention.")}
            eps = config[part]["rms_norm_eps"]
            normed = F.rms_norm(x, (sizes.hidden,), own["attention_norm.weight"], eps)[None]
            if kind == "mamba2":
                x = x + mamba2_matrix(normed, mixer, sizes)[0]
            else:
                x = x + attention_sdpa(normed, mixer, sizes, config[part]["rope_theta"])[0]
            normed = F.rms_norm(x, (sizes.hidden,), own["ffn_norm.weight"], eps)
            opened = F.silu(F.linear(normed, own["feed_forward.w1.weight"]))
            x = x + F.linear(opened * F.linear(normed, own["feed_forward.w3.weight"]), own["feed_forward.w2.weight"])
            outputs.append(x)
        if part == "embedding_config" and config.get("normalize_encoder_output"):
            x = F.normalize(x, dim=-1, eps=0.0)
    x = F.rms_norm(x, (sizes.hidden,), w["language_model.model.norm.weight"], config["llm_config"]["rms_norm_eps"])
    return F.linear(x, w["language_model.output.weight"]), outputs
