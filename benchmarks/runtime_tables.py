"""Tables of the runs of whole models on a GPU: benchmarks/results/<gpu>-runtime.json and <gpu>-long-runs.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]

CONTENDERS = {
    "ours": "this project",
    "plain": "linear, PyTorch, plain modules",
    "triton": "linear, PyTorch, mamba-ssm's operators, CUDA graph",
    "teacher-static": "teacher, static cache, CUDA graph",
    "teacher-hf-flash": "teacher, growing cache, flash attention",
    "teacher-hf-eager": "teacher, growing cache, eager attention",
}
NAMES = {**CONTENDERS, "teacher-flash": "teacher, flash attention", "teacher-cudnn": "teacher, cuDNN attention"}
NAMES |= {"teacher-eager": "teacher, eager attention"}
NAMES |= {"int8": "this project, INT8 weights", "int4": "this project, INT4 weights"}
STATIC_WAYS = {
    "teacher-static-cudnn": "cuDNN attention",
    "teacher-static-flash": "flash attention",
    "teacher-static-products": "matrix products",
}
# A prefill of the teacher does not depend on what its decode steps do with the cache; eager attention cannot hold its scores.
PREFILL_OF = {"teacher-static": "teacher-cudnn", "teacher-hf-flash": "teacher-flash"}


SHORT = ("ours", "triton", "teacher-static", "teacher-hf-flash", "teacher-hf-eager")


def runtime_table(results: Results) -> str:
    """Everything that was measured of the models, a column for each contender; the fastest static teacher stands for its kind."""
    rows = _measured(results)
    sizes = sorted({(r["name"], r["batch"], r["tokens"]) for r in rows})
    longest = max((tokens for _, _, tokens in sizes), default=0)
    return _models_table(rows, sizes, longest, tuple(CONTENDERS))


def short_table(results: Results) -> str:
    """The shortest and the longest context, and a sentence on what the longest ratio is made of."""
    rows = _measured(results)
    sizes = sorted({(r["name"], r["batch"], r["tokens"]) for r in rows})
    lengths = sorted({tokens for _, _, tokens in sizes})
    shown = [size for size in sizes if size[2] in (lengths[0], lengths[-1])]
    table = _models_table(rows, shown, lengths[-1], SHORT)
    ratio = next(
        (
            row
            for row in results["rows"]
            if (row["name"], row.get("of"), row.get("contender"), row.get("batch"), row.get("tokens"))
            == ("ratio", "decode", "teacher-hf-eager", 1, lengths[-1])
        ),
        None,
    )
    if ratio is None:
        return table
    return (
        f"{table}\n\nA decode step at {lengths[-1]:,} tokens is {ratio['ratio']:.0f} times as fast as the teacher's with a growing "
        f"cache and eager attention. Of that {ratio['algorithm']:.1f} times is the algorithm, which is what remains to a teacher with "
        f"a static cache in a CUDA graph; times {ratio['overhead']:.1f} is the overhead of that other implementation."
    )


def _models_table(
    rows: Sequence[Row], sizes: Sequence[tuple[str, int, int]], longest: int, contenders: Sequence[str]
) -> str:
    lines = []
    for name, batch, tokens in sizes:
        what = "decode step" if name == "decode" else "prefill"
        cells = [_ms(_row(rows, name, contender, batch, tokens)) for contender in contenders]
        lines.append((f"{what}, batch {batch}, {tokens:,} tokens, ms", *cells))
    for name in ("decode", "prefill"):
        found = [_row(rows, name, contender, 1, longest) for contender in contenders]
        what = "memory while decoding" if name == "decode" else "memory of the prefill"
        lines.append((f"{what}, {longest:,} tokens, GiB", *(_gib(row) for row in found)))
    header = [CONTENDERS[contender] for contender in contenders]
    return _table(("2.7B parameters, bf16, random weights", *header), lines)


def ratios_table(results: Results) -> str:
    lines = [
        (
            f"{'decode step' if r['of'] == 'decode' else 'prefill'}, batch {r['batch']}, {r['tokens']:,} tokens",
            NAMES[r["contender"]],
            f"{r['ratio']:.2f}",
            f"{r['algorithm']:.2f}" if "algorithm" in r else "",
            f"{r['bytes']:.2f}" if "bytes" in r else "",
            f"{r['overhead']:.2f}" if "overhead" in r else "",
        )
        for r in results["rows"]
        if r["name"] == "ratio"
    ]
    header = ("time over ours", "of", "ratio", "algorithm: static teacher over ours", "of that by bytes", "overhead")
    return _table(header, lines)


def roofline_table(results: Results) -> str:
    """How near each contender comes to the least time of its bytes, at the rate of a copy and at the maker's figure."""
    times = {
        (r["contender"], r["batch"], r["tokens"]): r["ms"]
        for r in _measured(results)
        if r["name"] == "decode" and "ms" in r
    }
    lines = []
    for r in results["rows"]:
        if r["name"] != "roofline":
            continue
        contender = r["contender"]
        way = f"teacher, static cache, {STATIC_WAYS[contender]}" if contender in STATIC_WAYS else NAMES[contender]
        ms = times[(contender, r["batch"], r["tokens"])]
        shares = [f"{r[key]:.0%}" if key in r else "" for key in ("copy_share", "nominal_share")]
        lines.append(
            (f"{way}, batch {r['batch']}, {r['tokens']:,} tokens", f"{r['bytes'] / 1e9:.2f}", f"{ms:.2f}", *shares)
        )
    return _table(("decode step", "GB moved at least", "ms", "of a copy's rate", "of the nominal rate"), lines)


def memory_table(results: Results) -> str:
    lines = [
        (
            f"batch {r['batch']}, {r['tokens']:,} tokens",
            "teacher, static cache" if "static" in r["contender"] else NAMES[r["contender"]],
            f"{r['ours_bytes'] / 2**30:.2f}",
            f"{r['their_bytes'] / 2**30:.2f}",
            f"{r['saved']:.1%}",
            f"{r['saved_with_prefill']:.1%}" if "saved_with_prefill" in r else "",
        )
        for r in results["rows"]
        if r["name"] == "memory"
    ]
    return _table(("GiB while decoding", "against", "ours", "theirs", "saved", "saved, prefill included"), lines)


def targets_table(results: Results) -> str:
    lines = []
    for r in results["rows"]:
        if r["name"] != "target":
            continue
        percent = r["at_least"] < 1
        shown = [
            f"{r[key]:.1%}" if percent else f"{r[key]:,.4g}" for key in ("at_least", "aim", "measured") if key in r
        ]
        verdict = "not measured"
        if "measured" in r:
            verdict = "aim reached" if r["is_aim_reached"] else "reached" if r["is_reached"] else "missed"
        lines.append((r["figure"], *shown[:2], shown[2] if len(shown) > 2 else "", verdict))
    return _table(("figure", "at least", "aim", "measured", ""), lines)


def agreement_table(results: Results) -> str:
    lines = [
        (
            NAMES.get(r["contender"], r["contender"]),
            f"{r['distance']:.1e}",
            f"{r['same_choice']} of {r['steps']}",
        )
        for r in results["rows"]
        if r["name"] == "agreement"
    ]
    header = ("same weights and tokens, against plain modules in float32", "distance of logits, worst", "same token")
    return _table(header, lines)


def long_runs_table(results: Results) -> str:
    lines = []
    for r in results["rows"]:
        if r["name"] == "prompt":
            what = f"prompt of {r['tokens']:,} tokens in chunks of {r['chunk_tokens']:,}"
            lines.append((what, f"{r['seconds']:.1f} s, {r['tokens_per_s']:,.0f} tokens/s", ""))
        elif r["name"] == "steps":
            ends = f"first tenth {r['first_ms']:.3f} ms, last {r['last_ms']:.3f} ms"
            lines.append((f"{r['steps']:,} decode steps after it", f"{r['ms']:.3f} ms a step; {ends}", ""))
        elif r["name"] == "agreement":
            found = f"logits {r['logits_distance']:.1e}, worst state {r['state_distance']:.1e}"
            lines.append(
                (
                    f"distance of {r['between']}, {r['tokens']:,} tokens",
                    found,
                    f"{r['bound']:.2g}, {r['state_bound']:.2g}",
                )
            )
        elif r["name"] == "verdict":
            found = "" if r.get("found") is None else f"{r['found']:.2g}, "
            lines.append(
                (r["of"], found + ("yes" if r["holds"] else "NO"), "" if r["bound"] is None else f"{r['bound']:g}")
            )
    return _table(("", "found", "bound"), lines)


def _measured(results: Results) -> list[Row]:
    return [row for row in results["rows"] if row["name"] in ("decode", "prefill")]


def _row(rows: Sequence[Row], name: str, contender: str, batch: int, tokens: int) -> Row | None:
    """Find a contender's row; of static teachers the fastest; one that is missing only if nothing was measured."""
    if name == "prefill":
        contender = PREFILL_OF.get(contender, contender)
    wanted = [
        row
        for row in rows
        if (row["name"], row["batch"], row["tokens"]) == (name, batch, tokens)
        and (row["contender"] == contender or (contender == "teacher-static" and row["contender"] in STATIC_WAYS))
    ]
    return min(wanted, key=lambda row: row.get("ms", float("inf")), default=None)


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    return row["missing"] if "missing" in row else f"{row['ms']:.2f}" if row["ms"] < 100 else f"{row['ms']:,.0f}"


def _gib(row: Row | None) -> str:
    return "" if row is None or "device_bytes" not in row else f"{row['device_bytes'] / 2**30:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
