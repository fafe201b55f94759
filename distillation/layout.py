"""Which layers of a hybrid stay attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmm_export.errors import OptionError
from mmm_export.spec import LayerKind, ModelSpec

Placement = Literal["head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked"]
PLACEMENTS: tuple[Placement, ...] = ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked")


@dataclass(frozen=True)
class Layout:
    """How many layers stay attention, and where.

    Interleaved: the layers are cut into `attention_layers` blocks, as equal as can be, and the first ("head") or last
    ("tail") of each stays. Stacked: the first or the last ones stay, side by side. 0 gives a linear model.
    """

    attention_layers: int = 0
    placement: Placement = "head-interleaved"

    def kept(self, layers: int) -> tuple[int, ...]:
        """Global indices of the layers that stay attention, of `layers` in all.

        Raises:
            OptionError: more than there are.
        """
        count = self.attention_layers
        if not 0 <= count <= layers:
            raise OptionError(
                "layout.attention_layers is out of range",
                found=str(count),
                wanted=f"0 to {layers}, the teacher's layers",
            )
        if self.placement == "head-stacked":
            return tuple(range(count))
        if self.placement == "tail-stacked":
            return tuple(range(layers - count, layers))
        if self.placement == "head-interleaved":
            return tuple(i * layers // count for i in range(count))
        return tuple((i + 1) * layers // count - 1 for i in range(count))


def student_spec(teacher: ModelSpec, kept: tuple[int, ...]) -> ModelSpec:
    """Give the dimensions of the student: the teacher's, but only the layers `kept` are attention."""
    first = len(teacher.embedding.kinds)

    def kinds(start: int, old: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
        return tuple("mamba2" if kind == "mha" and i not in kept else kind for i, kind in enumerate(old, start))

    return replace(
        teacher,
        embedding=replace(teacher.embedding, kinds=kinds(0, teacher.embedding.kinds)),
        llm=replace(teacher.llm, kinds=kinds(first, teacher.llm.kinds)),
    )
