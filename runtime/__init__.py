"""Runs a bundle: chunked prefill, decode steps over fixed state buffers, sampling, saved states. No torch, no onnx.

`Session` is the door for one sequence, `BatchSession` for several; `Backend` is what another inference engine has to provide.
"""

from mmm_export.runtime.answer import Answer, FinishReason, GenerationStatistics
from mmm_export.runtime.batch_session import DEFAULT_ROWS, Answered, BatchSession, Question
from mmm_export.runtime.generation import Generation
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.session import Session
from mmm_export.runtime.state_file import StateHeader, read_state_header

__all__ = [
    "DEFAULT_ROWS",
    "Answer",
    "Answered",
    "BatchSession",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationStatistics",
    "Question",
    "Session",
    "StateHeader",
    "read_state_header",
]
