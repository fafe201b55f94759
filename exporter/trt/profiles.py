"""Optimization profiles: the shapes that an engine takes, and refusals of ranges that contradict."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmm_export import names
from mmm_export.engine_manifest import ProfileInfo, ProfileName, ShapeRange
from mmm_export.errors import EngineError, OptionError
from mmm_export.manifest import TensorInfo

Range = tuple[int, int, int]


@dataclass(frozen=True)
class ProfileOptions:
    """Least, typical and most tokens of one prefill call; most rows and tiles."""

    prefill_tokens: Range = (1, 512, 2048)
    max_batch: int = 1
    max_tiles: int = 13

    def __post_init__(self) -> None:
        least, typical, most = self.prefill_tokens
        if not 1 <= least <= typical <= most:
            raise OptionError(
                "--prefill-tokens contradicts itself",
                found=f"{least},{typical},{most}",
                wanted="least,typical,most with 1 <= least <= typical <= most, such as 1,512,2048",
            )
        for name, value in (("--max-batch", self.max_batch), ("--max-tiles", self.max_tiles)):
            if value < 1:
                raise OptionError(f"{name} is too small", found=str(value), wanted="1 or more")


def parse_range(text: str) -> Range:
    """Turn "1,512,2048" into numbers. Raises OptionError."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 3 or not all(re.fullmatch(r"[0-9]{1,7}", word) for word in words):
        raise OptionError("--prefill-tokens cannot be read", found=repr(text), wanted="least,typical,most: 1,512,2048")
    least, typical, most = (int(word) for word in words)
    return least, typical, most


def decoder_profiles(inputs: tuple[TensorInfo, ...], options: ProfileOptions) -> tuple[ProfileInfo, ProfileInfo]:
    """Return the prefill profile (0) and that of decode steps (1) of one engine, with one copy of the weights.

    Both take two rows at least. For exactly one row and one token TensorRT-RTX writes matrix products as sums, which want the
    weights in another order: the engine would hold them twice, once for each profile, or at least the LM head (seen with 1.7.1).
    """
    batch = (1, options.max_batch, profile_rows(options))
    return (
        _profile("prefill", inputs, {"batch": batch, "tokens": options.prefill_tokens}),
        _profile("decode", inputs, {"batch": batch, "tokens": (1, 1, 1)}),
    )


def profile_rows(options: ProfileOptions) -> int:
    """Return the most rows of a decoder profile, which scratch memory is sized for."""
    return max(options.max_batch, 2)


def vision_profiles(inputs: tuple[TensorInfo, ...], options: ProfileOptions) -> tuple[ProfileInfo]:
    return (_profile("tiles", inputs, {"tiles": (1, options.max_tiles, options.max_tiles)}),)


def _profile(name: ProfileName, inputs: tuple[TensorInfo, ...], sizes: dict[str, Range]) -> ProfileInfo:
    def shapes(tensor: TensorInfo) -> ShapeRange:
        unknown = [size for size in tensor.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            raise EngineError(
                f"input {tensor.name} has a dimension that no profile names",
                found=", ".join(unknown),
                wanted=", ".join(sizes),
                hint="export the bundle again with this version",
            )
        each = (tuple(sizes[s][i] if isinstance(s, str) else s for s in tensor.shape) for i in range(3))
        return ShapeRange(*each)

    return ProfileInfo(name, {tensor.name: shapes(tensor) for tensor in inputs})


def most_tokens(profiles: tuple[ProfileInfo, ...]) -> int:
    """Return the longest prefill call of a decoder's profiles."""
    return profiles[0].inputs[names.INPUTS_EMBEDS].most[1]
