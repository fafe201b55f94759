"""What a decode step of so many rows reads and writes besides states, at fixed addresses of a device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.device_values import DeviceTensor
from mmm_export.runtime.pinned_memory import tensor_for_host
from mmm_export.spec import ModelSpec


class DecodeStep:
    """Tensors of a step, and the bindings of the runs that make it: `embedding`, which writes `embeds` where no table of rows is at
    hand, and by the slot they read `decoders` and their `options`.

    Args:
        spec: the model.
        dtype: of its embeddings.
        device: where the tensors lie.
        lanes: rows of the step.
    """

    def __init__(self, spec: ModelSpec, dtype: str, device: str, lanes: int) -> None:
        self.ids = DeviceTensor((lanes, 1), "int64", device)
        self.embeds = DeviceTensor((lanes, 1, spec.hidden_size), dtype, device)
        self.lengths = DeviceTensor((lanes,), "int32", device)
        self.past_lengths = DeviceTensor((lanes,), "int32", device)
        self.logits = tensor_for_host((lanes, 1, spec.vocab_size), device)
        self.embedding: Any = None
        self.decoders: tuple[Any, ...] = ()
        self.options: tuple[Any, ...] = ()
        self._lengths: NDArray[np.int32] = np.full(lanes, -1, np.int32)  # as they are on the device

    def write(self, lengths: NDArray[np.int32], past_lengths: NDArray[np.int32] | None) -> None:
        """Update what the next run reads besides its tokens; `past_lengths` only where the model takes them."""
        if lengths is not self._lengths and not np.array_equal(lengths, self._lengths):  # they seldom change
            self.lengths.write(lengths)
            self._lengths = lengths
        if past_lengths is not None:
            self.past_lengths.write(past_lengths)
