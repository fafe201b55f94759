"""What follows from the rows of the figure: ratios split into algorithm and overhead, shares of the roofline, and the targets.

A ratio between the teacher and the linear model has two factors. The algorithm's is what remains between implementations of like
quality: the teacher with a static cache in a CUDA graph, by the fastest of its attention kernels, over ours. Of a decode step it says
besides how much of that are the bytes that each must move. The overhead is the contender over that teacher: what growing the cache,
repeating it for each head and launching kernels one by one cost. Contenders that run the linear model themselves differ by overhead
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
OURS = "ours"
STATIC = ("teacher-static-cudnn", "teacher-static-flash", "teacher-static-products")
STEPS_AGAINST = ("teacher-hf-eager", "teacher-hf-flash", "plain", "triton")
PREFILLS_AGAINST = ("teacher-flash", "teacher-cudnn", "plain", "triton")
LONG = 103_000
# Peak rates by a word of the GPU's name, as its maker states them.
NOMINAL_BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12}


@dataclass(frozen=True)
class Target:
    """A figure that this project set out to reach on an H100: at least, and the aim.

    Attributes:
        figure: what it is called.
        kind: "ms" of a contender, "ratio" or "algorithm" of a ratio, "gib" of memory, "saved" a share of memory.
        contender: that is measured, or that ours is compared with.
        better: which direction is.
    """

    figure: str
    kind: Literal["ms", "ratio", "algorithm", "gib", "saved"]
    name: Literal["prefill", "decode"]
    contender: str
    batch: int
    tokens: int
    at_least: float
    aim: float
    better: Literal["lower", "higher"] = "lower"


TARGETS = (
    Target("decode, batch 1, bf16, ms", "ms", "decode", OURS, 1, 1024, 1.9, 1.75),
    Target("decode, batch 8, bf16, ms", "ms", "decode", OURS, 8, 1024, 2.4, 2.0),
    Target("decode, batch 1, INT8 weights, ms", "ms", "decode", "int8", 1, 1024, 1.25, 1.1),
    Target("decode, batch 1, INT4 weights, ms", "ms", "decode", "int4", 1, 1024, 1.1, 0.85),
    Target("prefill of 1,024 tokens, ms", "ms", "prefill", OURS, 1, 1024, 8.0, 6.5),
    Target("prefill of 103,000 tokens, ms", "ms", "prefill", OURS, 1, LONG, 760.0, 640.0),
    Target("peak memory of a prompt of 103,000 tokens, GiB", "gib", "prefill", OURS, 1, LONG, 6.0, 5.4),
    Target(
        "decode at 103,000: teacher as in transformers, eager attention, over ours",
        "ratio",
        "decode",
        "teacher-hf-eager",
        1,
        LONG,
        45,
        54,
        "higher",
    ),
    Target(
        "decode at 103,000: teacher with static cache in a CUDA graph over ours",
        "algorithm",
        "decode",
        "teacher-hf-eager",
        1,
        LONG,
        4.0,
        4.6,
        "higher",
    ),
    Target(
        "memory saved at 103,000 against the teacher as in transformers, flash attention",
        "saved",
        "decode",
        "teacher-hf-flash",
        1,
        LONG,
        0.70,
        0.72,
        "higher",
    ),
)


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """Derive all rows that follow from the measured ones."""
    index = Index(rows)
    derived = [*ratio_rows(index), *roofline_rows(index), *memory_rows(index)]
    return [*derived, *target_rows(Index([*rows, *derived]))]


class Index:
    """Rows by name, contender, batch and tokens; those without a figure are not there."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._found = {self._key(row): row for row in rows if "missing" not in row}

    def get(self, name: str, contender: str, batch: int, tokens: int) -> Row | None:
        return self._found.get((name, contender, batch, tokens))

    def ms(self, name: str, contender: str, batch: int, tokens: int) -> float | None:
        row = self.get(name, contender, batch, tokens)
        return None if row is None else float(row["ms"])

    def nearest_ms(self, name: str, contender: str, batch: int, tokens: int) -> float | None:
        """As `ms`; of a linear model's decode step at another length where this one was not measured: it costs the same."""
        exact = self.ms(name, contender, batch, tokens)
        if exact is not None or name != "decode" or contender.startswith("teacher"):
            return exact
        others = [row for row in self._found.values() if self._key(row)[:3] == (name, contender, batch)]
        return float(min(others, key=lambda row: abs(row["tokens"] - tokens))["ms"]) if others else None

    def best_static_ms(self, name: str, batch: int, tokens: int) -> float | None:
        """The fastest teacher of like quality: graphs and static caches for a step, cuDNN or flash attention for a prefill."""
        contenders = STATIC if name == "decode" else ("teacher-cudnn", "teacher-flash")
        found = [ms for c in contenders if (ms := self.ms(name, c, batch, tokens)) is not None]
        return min(found, default=None)

    def sizes(self) -> list[tuple[str, int, int]]:
        """Name, batch and tokens of all that ours was measured at."""
        ours = [row for row in self._found.values() if row.get("contender") == OURS and "ms" in row]
        return [(row["name"], row["batch"], row["tokens"]) for row in ours]

    def moved_bytes(self, batch: int, tokens: int) -> tuple[int, int] | None:
        """Bytes that a decode step of ours and of the teacher must move at least; None where a size is not known."""
        teacher, ours = self.first("teacher_bytes"), self.linear_bytes(OURS)
        if not teacher or not ours:
            return None
        return _linear_bytes(ours, batch), _teacher_bytes(teacher, batch, tokens)

    def linear_bytes(self, contender: str) -> Row:
        """Sizes of a linear contender's weights and state; of ours where it has none of its own."""
        found = {row["contender"]: row for row in self.rows if row["name"] == "linear_bytes"}
        return found.get(contender) or found.get(OURS) or {}

    def first(self, name: str) -> Row:
        return next((row for row in self.rows if row["name"] == name and "missing" not in row), {})

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return (row["name"], row.get("contender"), row.get("batch"), row.get("tokens"))


def ratio_rows(index: Index) -> Iterator[Row]:
    """Every contender over ours, split."""
    for name, batch, tokens in index.sizes():
        ours = index.ms(name, OURS, batch, tokens)
        assert ours is not None
        static = index.best_static_ms(name, batch, tokens)
        for against in STEPS_AGAINST if name == "decode" else PREFILLS_AGAINST:
            theirs = index.nearest_ms(name, against, batch, tokens)
            if theirs is None:
                continue
            row: Row = {"name": "ratio", "of": name, "contender": against, "batch": batch, "tokens": tokens}
            row["ratio"] = theirs / ours
            if not against.startswith("teacher"):
                row |= {"algorithm": 1.0, "overhead": theirs / ours}
            elif static is not None:
                row |= {"algorithm": static / ours, "overhead": theirs / static}
                if name == "decode" and (moved := index.moved_bytes(batch, tokens)):
                    row["bytes"] = moved[1] / moved[0]
            yield row


def roofline_rows(index: Index) -> Iterator[Row]:
    """Bytes that a decode step must move, and how near a contender comes to the time they take."""
    rates = {"copy": index.first("ceiling_copy").get("bytes_per_s")}
    model = str(index.first("gpu").get("model", ""))
    rates["nominal"] = next((rate for word, rate in NOMINAL_BYTES_PER_S.items() if word in model), None)
    teacher = index.first("teacher_bytes")
    for row in index.rows:
        if row["name"] != "decode" or "ms" not in row:
            continue
        contender, batch = row["contender"], row["batch"]
        if contender.startswith("teacher"):
            needed = _teacher_bytes(teacher, batch, row["tokens"]) if teacher else 0
        else:
            linear = index.linear_bytes(contender)
            needed = _linear_bytes(linear, batch) if linear else 0
        if not needed:
            continue
        found: Row = {"name": "roofline", "contender": contender, "batch": batch, "tokens": row["tokens"]}
        found["bytes"] = needed
        for what, rate in rates.items():
            if rate:
                found |= {f"{what}_ms": needed / rate * 1e3, f"{what}_share": needed / rate * 1e3 / row["ms"]}
        yield found


def memory_rows(index: Index) -> Iterator[Row]:
    """The share of memory that ours saves, of a decode step alone and of the whole way there, prefill included."""
    for name, batch, tokens in index.sizes():
        ours, prefill = (index.get(n, OURS, b, tokens) for n, b in (("decode", batch), ("prefill", 1)))
        if name != "decode" or ours is None:
            continue
        for against in ("teacher-hf-flash", "teacher-hf-eager", "teacher-static-cudnn"):
            theirs = index.get("decode", against, batch, tokens)
            if theirs is None or not theirs["device_bytes"]:
                continue
            row: Row = {"name": "memory", "contender": against, "batch": batch, "tokens": tokens}
            row |= {"ours_bytes": ours["device_bytes"], "their_bytes": theirs["device_bytes"]}
            row["saved"] = 1 - ours["device_bytes"] / theirs["device_bytes"]
            whole = index.get("prefill", "teacher-cudnn" if "static" in against else "teacher-flash", 1, tokens)
            if batch == 1 and prefill is not None and whole is not None:
                most = max(ours["device_bytes"], prefill["device_bytes"])
                row["saved_with_prefill"] = 1 - most / max(theirs["device_bytes"], whole["device_bytes"])
            yield row


def target_rows(index: Index) -> Iterator[Row]:
    ratios = {(r["of"], r["contender"], r["batch"], r["tokens"]): r for r in index.rows if r["name"] == "ratio"}
    for t in TARGETS:
        row: Row = {"name": "target", "figure": t.figure, "at_least": t.at_least, "aim": t.aim, "better": t.better}
        place = (t.contender, t.batch, t.tokens)
        measured: float | None = None
        if t.kind == "ms":
            measured = index.ms(t.name, *place)
        elif t.kind == "gib":
            found = index.get(t.name, *place)
            measured = None if found is None else found["device_bytes"] / 2**30
        elif t.kind == "saved":
            found = index.get("memory", *place)
            measured = None if found is None else found["saved"]
        else:
            measured = ratios.get((t.name, *place), {}).get(t.kind)
        if measured is None:
            yield {**row, "missing": "not measured"}
            continue
        sign = 1 if t.better == "higher" else -1
        yield {
            **row,
            "measured": measured,
            "is_reached": sign * measured >= sign * t.at_least,
            "is_aim_reached": sign * measured >= sign * t.aim,
        }


def _linear_bytes(sizes: Row, batch: int) -> int:
    """Weights once, states read and written."""
    return int(sizes["weights"] + 2 * batch * sizes["state"])


def _teacher_bytes(sizes: Row, batch: int, tokens: int) -> int:
    """Weights once, the cache of the context and of the token itself."""
    return int(sizes["weights"] + sizes["cache_per_token"] * batch * (tokens + 1))
