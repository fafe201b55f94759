"""Tables of `mmm-export evaluate`."""

from __future__ import annotations

from collections.abc import Mapping

from mmm_export.evaluation.scoring import Share
from mmm_export.rendering.text import printable, table

COLUMNS = ("questions", "right", "of", "accuracy", "95 % interval")


def accuracy_table(found: Mapping[str, Share]) -> str:
    """Render shares by kind of question, those of all questions last."""
    kinds = [kind for kind in found if kind != "all"] if len(found) > 2 else []
    rows = [_row(printable(kind), found[kind]) for kind in kinds]
    return table([COLUMNS, *rows, _row("all", found["all"])])


def _row(name: str, share: Share) -> tuple[str, ...]:
    low, high = share.interval
    return name, str(share.right), str(share.total), f"{share.accuracy:.1%}", f"{low:.1%} to {high:.1%}"
