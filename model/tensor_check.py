"""Compares the tensors that a checkpoint stores with those that its model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.stored import DTYPES, StoredTensor

Stored = Mapping[str, StoredTensor]

# Parts that the mixer of this family can have in code but no released model has: the scan operator takes no such input.
_REFUSED = {
    re.compile(r"\.attention\.D$"): "a skip term D",
    re.compile(r"\.attention\.[qk]_norm(\.|$)"): "norms of queries and keys",
    re.compile(r"\.ls[12]?(\.|$)"): "layer scale",
}


def check_variants(stored: Collection[str]) -> None:
    """Refuse models with parts that the scan operator does not have.

    Raises:
        CheckpointError: naming the tensor and the part.
    """
    for name in sorted(stored):
        for pattern, part in _REFUSED.items():
            if pattern.search(name):
                raise CheckpointError(
                    f"the model has {part}, which is not supported",
                    found=f"tensor {name}",
                    wanted="layers as in the released models, which have none",
                )


def check_tensors(stored: Stored, required: Mapping[str, tensors.Shape], unused: Collection[str]) -> None:
    """Check presence, shape and number format of every tensor.

    Args:
        stored: all tensors.
        required: shapes of the tensors that running the model needs.
        unused: names of tensors that may be there but are never read, besides rotary buffers.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown, or not as it should be.
    """
    missing = [name for name in required if name not in stored]
    unknown = [
        name
        for name in sorted(stored)
        if name not in required and name not in unused and not name.endswith(tensors.ROTARY_BUFFER)
    ]
    if missing:
        raise missing_tensor(missing[0], others=len(missing) - 1, candidates=unknown)
    for name, shape in required.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name} has the wrong shape", found=str(list(tensor.shape)), wanted=str(list(shape))
            )
        if tensor.format not in DTYPES:
            raise CheckpointError(
                f"tensor {name} has an unsupported number format",
                found=tensor.format,
                wanted=", ".join(DTYPES),
                hint="convert the checkpoint to one of them first",
            )
    if unknown:
        raise CheckpointError(
            f"tensor {unknown[0]} belongs to no part of the model",
            found=f"{len(unknown)} unknown tensors" if len(unknown) > 1 else "an unknown tensor",
            wanted="the tensors of an mmMamba checkpoint and no others",
        )


def missing_tensor(name: str, *, others: int = 0, candidates: Collection[str] = ()) -> CheckpointError:
    """Build the error for a tensor that should be there.

    Args:
        name: the tensor.
        others: how many more are missing.
        candidates: tensors that nothing asks for; one of them may be the missing one under another name.
    """
    hint = "the file may be of another checkpoint, or a shard may be missing"
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    if name.endswith(("dt_bias", "A_log_bias")):
        hint = (
            "the last training stage does not store dt_bias and A_log_bias; convert it together with the stage before"
        )
    elif near:
        hint = f"is {near[0]} meant?"
    found = f"this and {others} others are missing" if others else "it is missing"
    return CheckpointError(f"tensor {name} is missing", found=found, wanted="all tensors of the model", hint=hint)
