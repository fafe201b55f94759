"""Where each buffer of an engine lies in device memory: sizes, alignment and total, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIGNMENT = (
    256  # TensorRT wants it for scratch memory; cudaMalloc gives it too, so every address is as good as one of its own
)
MOST_ARENA_BYTES = 512 << 20  # boards with 8 GB fail on larger contiguous blocks


@dataclass(frozen=True)
class Place:
    """A buffer: which arena, the offset in it, and its size in bytes (0 for one that needs no memory)."""

    arena: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class BufferPlan:
    """All buffers of one owner, packed into arenas: contiguous blocks that are allocated one by one.

    Attributes:
        arenas: bytes of each.
        places: by buffer name.
    """

    arenas: tuple[int, ...]
    places: dict[str, Place]

    @property
    def total_bytes(self) -> int:
        return sum(self.arenas)


def plan_buffers(sizes: Mapping[str, int], *, arena_bytes: int = MOST_ARENA_BYTES) -> BufferPlan:
    """Pack buffers into arenas in their order; one that is larger than an arena gets one of its own.

    Args:
        sizes: bytes of each buffer.
        arena_bytes: an arena of several buffers is at most so large.
    """
    arenas: list[int] = []
    places: dict[str, Place] = {}
    for name, size in sizes.items():
        needed = max(1, -(-size // ALIGNMENT)) * ALIGNMENT  # none shares an address, not even empty ones
        if not arenas or arenas[-1] + needed > arena_bytes:
            arenas.append(0)
        places[name] = Place(len(arenas) - 1, arenas[-1], size)
        arenas[-1] += needed
    return BufferPlan(tuple(arenas), places)
