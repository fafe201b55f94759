"""Runs a bundle: chunked prefill, decode steps over fixed state buffers, sampling, saved states. No torch, no onnx.

`Session` is the door; `Backend` is what another inference engine has to provide.
"""

from mmm_export.runtime.generation import FinishReason, Generation, GenerationStatistics
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.session import Session
from mmm_export.runtime.state_file import StateHeader, read_state_header

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationStatistics",
    "Session",
    "StateHeader",
    "read_state_header",
]
