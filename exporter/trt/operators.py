"""Which operators a TensorRT takes as one layer, by library and version; what it lacks is left in simpler ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmm_export.engine_manifest import Flavor
from mmm_export.manifest import Dtype

BUNDLE_OPSET = 20
NATIVE_OPSET = 24  # the first with Swish and TensorScatter

Version = tuple[int, ...]


@dataclass(frozen=True)
class Operators:
    """Spelling of a lowered graph.

    Attributes:
        opset: version of the standard operators that the graph declares.
        rms_norm: RMSNormalization, else squares, mean and root.
        rotary: RotaryEmbedding, else products of halves.
        swish: Swish, else a product with Sigmoid.
        cached_attention: TensorScatter and Attention, which write the KV cache in place; else a plain form.
    """

    opset: int
    rms_norm: bool
    rotary: bool
    swish: bool
    cached_attention: bool


PLAIN = Operators(BUNDLE_OPSET, rms_norm=False, rotary=False, swish=False, cached_attention=False)
NATIVE = Operators(NATIVE_OPSET, rms_norm=True, rotary=True, swish=True, cached_attention=True)

# First version whose ONNX parser has the operator (CHANGELOG of TensorRT's open-source parts). TensorRT-RTX 1.7 has them all.
_SINCE_NORM_ROTARY_SCATTER = (10, 15)
_SINCE_SWISH = (11, 0)


def operators_of(flavor: Flavor, version: Version, dtype: Dtype) -> Operators:
    """Return what the library of this version takes for activations of this number format.

    TensorRT has no kernel for Attention in float32 and refuses it there (seen with TensorRT-RTX 1.7.1).
    """
    if flavor == "tensorrt" and version < _SINCE_NORM_ROTARY_SCATTER:
        return PLAIN
    swish = flavor == "tensorrt-rtx" or version >= _SINCE_SWISH
    return dataclasses.replace(NATIVE, swish=swish, cached_attention=dtype != "fp32")


def parse_version(text: str) -> Version:
    """Turn "10.3.0.30" into (10, 3, 0, 30); what follows a part that is no number is left out."""
    numbers: list[int] = []
    for part in text.split("."):
        if not (part.isascii() and part.isdigit()):
            break
        numbers.append(int(part))
    return tuple(numbers)
