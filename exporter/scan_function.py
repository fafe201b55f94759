"""The operator MmmSelectiveScan as an ONNX function, so that a runtime without our kernels can run a bundle.

A body is ONNX text in three parts: what comes before the recurrence (padding, convolution, delta), the recurrence itself, of
which there are three, and what comes after it (gated norm). All arithmetic is float32.
"""

from __future__ import annotations

from typing import Literal

import onnx

from mmm_export import names

Body = Literal["linear-attention", "standard", "standard-ops"]
BODIES: tuple[Body, ...] = ("linear-attention", "standard", "standard-ops")

INPUTS = (
    "projected",
    "lengths",
    "conv_state",
    "ssm_state",
    "conv_weight",
    "conv_bias",
    "dt_bias",
    "A_log",
    "norm_weight",
)
OUTPUTS = ("y", "conv_state_out", "ssm_state_out")
ATTRIBUTES = ("heads", "kv_heads", "head_dim", "state_dim", "eps", "plugin_version")
CHUNK_TOKENS = 64

# Shapes are vectors of one element each, so that they concatenate: H heads, C conv channels, share heads per KV head.
_SIZES = """
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    i0 = Constant <value_ints = [0]> ()
    i1 = Constant <value_ints = [1]> ()
    s0 = Constant <value_int = 0> ()
    s1 = Constant <value_int = 1> ()
    last_axis = Constant <value_ints = [-1]> ()
    heads_s = Constant <value_int: int = @heads> ()
    kv_heads_s = Constant <value_int: int = @kv_heads> ()
    head_dim_s = Constant <value_int: int = @head_dim> ()
    state_dim_s = Constant <value_int: int = @state_dim> ()
    H = Unsqueeze (heads_s, i0)
    KV = Unsqueeze (kv_heads_s, i0)
    P = Unsqueeze (head_dim_s, i0)
    N = Unsqueeze (state_dim_s, i0)
    share = Div (H, KV)
    HP = Mul (H, P)
    HN = Mul (H, N)
    KVP = Mul (KV, P)
    KVN = Mul (KV, N)
    KVPN = Add (KVP, KVN)
    C = Add (KVPN, HN)
    B = Shape <start = 0, end = 1> (projected)
    T = Shape <start = 1, end = 2> (projected)
"""

# Padding is replaced by zeros before any arithmetic: not even NaN in it can reach a state.
_ROWS = """
    T_s = Squeeze (T)
    order = Range (s0, T_s, s1)
    lengths64 = Cast <to = 7> (lengths)
    ends = Unsqueeze (lengths64, i1)
    valid_bt = Less (order, ends)
    valid = Unsqueeze (valid_bt, last_axis)
    wide = Cast <to = 1> (projected)
    rows = Where (valid, wide, zero)
    row_sizes = Concat <axis = 0> (C, HP, H)
    raw, gate, dt = Split <axis = -1> (rows, row_sizes)
"""

# softplus through log1p(e) = log(w) e / (w - 1), w = 1 + e: a plain log(1 + e) loses the digits of a small delta.
_DELTA = """
    dt_bias32 = Cast <to = 1> (dt_bias)
    biased = Add (dt, dt_bias32)
    magnitude = Abs (biased)
    negated = Neg (magnitude)
    e = Exp (negated)
    w = Add (one, e)
    w_minus = Sub (w, one)
    tiny = Equal (w_minus, zero)
    divisor = Where (tiny, one, w_minus)
    log_w = Log (w)
    log_w_e = Mul (log_w, e)
    quotient = Div (log_w_e, divisor)
    log1p_e = Where (tiny, e, quotient)
    positive = Relu (biased)
    softplus = Add (positive, log1p_e)
    delta = Where (valid, softplus, zero)
    A_log32 = Cast <to = 1> (A_log)
    rate = Exp (A_log32)
    A = Neg (rate)
    log_decay = Mul (delta, A)
"""

_HEADS = """
    vkq_sizes = Concat <axis = 0> (KVP, KVN, HN)
    v_kv, k_kv, q = Split <axis = -1> (mixed, vkq_sizes)
    v_split = Concat <axis = 0> (B, T, KV, i1, P)
    v_wide = Concat <axis = 0> (B, T, KV, share, P)
    v_heads = Concat <axis = 0> (B, T, H, P)
    v_5 = Reshape <allowzero = 1> (v_kv, v_split)
    v_g = Expand (v_5, v_wide)
    v = Reshape <allowzero = 1> (v_g, v_heads)
    k_split = Concat <axis = 0> (B, T, KV, i1, N)
    k_wide = Concat <axis = 0> (B, T, KV, share, N)
    k_heads = Concat <axis = 0> (B, T, H, N)
    k_5 = Reshape <allowzero = 1> (k_kv, k_split)
    k_g = Expand (k_5, k_wide)
    k = Reshape <allowzero = 1> (k_g, k_heads)
    delta_4 = Unsqueeze (delta, last_axis)
    x = Mul (v, delta_4)
    past = Cast <to = 1> (ssm_state)
    x_shape = Concat <axis = 0> (B, T, HP)
    kq_shape = Concat <axis = 0> (B, T, HN)
"""

_LINEAR_ATTENTION = """
    x_flat = Reshape <allowzero = 1> (x, x_shape)
    k_flat = Reshape <allowzero = 1> (k, kq_shape)
    past_np = Transpose <perm = [0, 1, 3, 2]> (past)
    scanned, state_np = {domain}LinearAttention <q_num_heads: int = @heads, kv_num_heads: int = @heads,
        update_rule = "gated", scale = 1.0> (q, k_flat, x_flat, past_np, log_decay)
    state = Transpose <perm = [0, 1, 3, 2]> (state_np)
"""

# One token directly; more tokens by chunks: E holds the past state and what each chunk adds, S = decays @ E the state before
# each chunk and after the last.
_STANDARD = f"""
    q_heads = Reshape <allowzero = 1> (q, k_heads)
    single = Equal (T_s, s1)
    scanned_4, state = If (single) <
      then_branch = one_token () => (scanned_one, state_one) {{
        decay_bh = Exp (log_decay)
        hp1 = Concat <axis = 0> (B, H, P, i1)
        h1n = Concat <axis = 0> (B, H, i1, N)
        hn1 = Concat <axis = 0> (B, H, N, i1)
        h11 = Concat <axis = 0> (B, H, i1, i1)
        decay_1 = Reshape (decay_bh, h11)
        x_1 = Reshape (x, hp1)
        k_1 = Reshape (k, h1n)
        q_1 = Reshape (q_heads, hn1)
        kept = Mul (decay_1, past)
        outer = Mul (x_1, k_1)
        state_one = Add (kept, outer)
        read = MatMul (state_one, q_1)
        one_shape = Concat <axis = 0> (B, i1, H, P)
        scanned_one = Reshape (read, one_shape)
      }},
      else_branch = many_tokens () => (scanned_many, state_many) {{
        L = Constant <value_ints = [{CHUNK_TOKENS}]> ()
        L_s = Constant <value_int = {CHUNK_TOKENS}> ()
        neg_inf = Constant <value_float = -inf> ()
        L_less = Sub (L, i1)
        T_up = Add (T, L_less)
        chunks = Div (T_up, L)
        T_full = Mul (chunks, L)
        missing = Sub (T_full, T)
        pads_4 = Concat <axis = 0> (i0, i0, i0, i0, i0, missing, i0, i0)
        pads_3 = Concat <axis = 0> (i0, i0, i0, i0, missing, i0)
        x_full = Pad (x, pads_4, zero)
        k_full = Pad (k, pads_4, zero)
        q_full = Pad (q_heads, pads_4, zero)
        d_full = Pad (log_decay, pads_3, zero)
        clhp = Concat <axis = 0> (B, chunks, L, H, P)
        clhn = Concat <axis = 0> (B, chunks, L, H, N)
        clh = Concat <axis = 0> (B, chunks, L, H)
        x_5 = Reshape (x_full, clhp)
        kc_5 = Reshape (k_full, clhn)
        q_5 = Reshape (q_full, clhn)
        d_4 = Reshape (d_full, clh)
        xc = Transpose <perm = [0, 3, 1, 2, 4]> (x_5)
        kc = Transpose <perm = [0, 3, 1, 2, 4]> (kc_5)
        kt = Transpose <perm = [0, 3, 1, 4, 2]> (kc_5)
        qc = Transpose <perm = [0, 3, 1, 2, 4]> (q_5)
        dc = Transpose <perm = [0, 3, 1, 2]> (d_4)
        axis_3 = Constant <value_int = 3> ()
        cum = CumSum (dc, axis_3)
        minus_2 = Constant <value_ints = [-2]> ()
        cum_i = Unsqueeze (cum, last_axis)
        cum_j = Unsqueeze (cum, minus_2)
        span = Sub (cum_i, cum_j)
        steps = Range (s0, L_s, s1)
        steps_i = Unsqueeze (steps, last_axis)
        causal = GreaterOrEqual (steps_i, steps)
        span_causal = Where (causal, span, neg_inf)
        within = Exp (span_causal)
        qk = MatMul (qc, kt)
        attention = Mul (qk, within)
        y_within = MatMul (attention, xc)
        total_4 = Slice (cum, last_axis, L, last_axis)
        rest = Sub (total_4, cum)
        rest_decay = Exp (rest)
        rest_5 = Unsqueeze (rest_decay, last_axis)
        x_rest = Mul (xc, rest_5)
        x_rest_t = Transpose <perm = [0, 1, 2, 4, 3]> (x_rest)
        added = MatMul (x_rest_t, kc)
        past_5 = Unsqueeze (past, minus_3)
        E = Concat <axis = 2> (past_5, added)
        chunks_1 = Add (chunks, i1)
        PN = Mul (P, N)
        e_shape = Concat <axis = 0> (B, H, chunks_1, PN)
        E_flat = Reshape (E, e_shape)
        total = Squeeze (total_4, last_axis)
        total_pads = Constant <value_ints = [0, 0, 1, 0, 0, 0]> ()
        total_0 = Pad (total, total_pads, zero)
        axis_2 = Constant <value_int = 2> ()
        total_cum = CumSum (total_0, axis_2)
        total_i = Unsqueeze (total_cum, last_axis)
        total_j = Unsqueeze (total_cum, minus_2)
        chunk_span = Sub (total_i, total_j)
        chunks_s = Squeeze (chunks_1)
        chunk_order = Range (s0, chunks_s, s1)
        chunk_i = Unsqueeze (chunk_order, last_axis)
        chunk_causal = GreaterOrEqual (chunk_i, chunk_order)
        chunk_masked = Where (chunk_causal, chunk_span, neg_inf)
        decays = Exp (chunk_masked)
        S_flat = MatMul (decays, E_flat)
        s_shape = Concat <axis = 0> (B, H, chunks_1, P, N)
        S = Reshape (S_flat, s_shape)
        axis_two = Constant <value_ints = [2]> ()
        S_before = Slice (S, i0, chunks, axis_two)
        S_end = Slice (S, chunks, chunks_1, axis_two)
        state_many = Squeeze (S_end, axis_two)
        S_t = Transpose <perm = [0, 1, 2, 4, 3]> (S_before)
        q_S = MatMul (qc, S_t)
        from_start = Exp (cum_i)
        y_across = Mul (q_S, from_start)
        y_sum = Add (y_within, y_across)
        y_t = Transpose <perm = [0, 2, 3, 1, 4]> (y_sum)
        full_shape = Concat <axis = 0> (B, T_full, H, P)
        y_full = Reshape (y_t, full_shape)
        scanned_many = Slice (y_full, i0, T, i1)
      }}
    >
    scanned = Reshape <allowzero = 1> (scanned_4, x_shape)
"""

_OUTPUT = """
    y_heads = Reshape <allowzero = 1> (scanned, v_heads)
    square = Mul (y_heads, y_heads)
    mean = ReduceMean <keepdims = 1> (square, last_axis)
    eps = Constant <value_float: float = @eps> ()
    mean_eps = Add (mean, eps)
    rms = Sqrt (mean_eps)
    unit = Div (y_heads, rms)
    norm_weight32 = Cast <to = 1> (norm_weight)
    scaled = Mul (unit, norm_weight32)
    scaled_flat = Reshape <allowzero = 1> (scaled, x_shape)
    gate_sigmoid = Sigmoid (gate)
    gate_silu = Mul (gate, gate_sigmoid)
    gated = Mul (scaled_flat, gate_silu)
    y = CastLike (gated, projected)
    ssm_state_out = CastLike (state, ssm_state)
"""


def scan_function(body: Body, *, conv_width: int, opset: int) -> onnx.FunctionProto:
    """Build the function body of MmmSelectiveScan.

    Args:
        body: how the recurrence is written. "linear-attention": com.microsoft::LinearAttention, the fastest on ONNX Runtime;
            "standard": chunked, in operators any runtime has; "standard-ops": LinearAttention and CausalConvWithState of
            the ONNX standard, from opset 27.
        conv_width: K of the short convolution.
        opset: version of the standard operators; must equal the model's.
    """
    standard_ops = body == "standard-ops"
    recurrence = _STANDARD if body == "standard" else _LINEAR_ATTENTION
    if body != "standard":
        recurrence = recurrence.replace("{domain}", "" if standard_ops else "com.microsoft.")
    parts = [_SIZES, _ROWS, _convolution(conv_width, as_operator=standard_ops), _DELTA, _HEADS, recurrence, _OUTPUT]
    if body == "standard":
        parts.insert(1, "    minus_3 = Constant <value_ints = [-3]> ()\n")
    opsets = f'"" : {opset}' + (', "com.microsoft" : 1' if body == "linear-attention" else "")
    header = f'<domain: "{names.OP_DOMAIN}", opset_import: [{opsets}]>\n{names.OP_NAME} <{", ".join(ATTRIBUTES)}>'
    signature = f"({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)})"
    return onnx.parser.parse_function(f"{header} {signature} {{{''.join(parts)}}}")


def _convolution(width: int, *, as_operator: bool) -> str:
    """Convolution and SiLU, raw (B, T, C) to `mixed`, and the conv state: the K-1 raw rows before each row's end."""
    lines = [
        "conv_state32 = Cast <to = 1> (conv_state)",
        "before = Transpose <perm = [0, 2, 1]> (conv_state32)",
        "window = Concat <axis = 1> (before, raw)",
        f"tail_steps = Constant <value_ints = {list(range(width - 1))}> ()",
        "tail_rows = Add (ends, tail_steps)",
        "tail_index = Unsqueeze (tail_rows, last_axis)",
        "tail = GatherND <batch_dims = 1> (window, tail_index)",
        "tail_t = Transpose <perm = [0, 2, 1]> (tail)",
        "conv_state_out = CastLike (tail_t, conv_state)",
        "conv_weight32 = Cast <to = 1> (conv_weight)",
        "conv_bias32 = Cast <to = 1> (conv_bias)",
    ]
    if as_operator:
        lines += [
            "raw_t = Transpose <perm = [0, 2, 1]> (raw)",
            "conv_kernel = Unsqueeze (conv_weight32, i1)",
            'mixed_t, conv_tail = CausalConvWithState <activation = "silu"> (raw_t, conv_kernel, conv_bias32, conv_state32)',
            "mixed = Transpose <perm = [0, 2, 1]> (mixed_t)",
        ]
    else:
        # Slices and products: for so short a kernel ONNX Runtime's convolutions are slower.
        for i in range(width):
            lines += [
                f"at_{i} = Constant <value_ints = [{i}]> ()",
                f"end_{i} = Add (T, at_{i})",
                f"slice_{i} = Slice (window, at_{i}, end_{i}, i1)",
                f"tap_{i}_s = Constant <value_int = {i}> ()",
                f"tap_{i} = Gather <axis = 1> (conv_weight32, tap_{i}_s)",
                f"product_{i} = Mul (slice_{i}, tap_{i})",
                f"sum_{i} = Add ({'conv_bias32' if i == 0 else f'sum_{i - 1}'}, product_{i})",
            ]
        lines += [
            f"mixed_sigmoid = Sigmoid (sum_{width - 1})",
            f"mixed = Mul (sum_{width - 1}, mixed_sigmoid)",
        ]
    return "".join(f"    {line}\n" for line in lines)
