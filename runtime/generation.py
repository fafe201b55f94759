"""An answer of a session: an iterator of text that runs the model as it is iterated."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from mmm_export.runtime.answer import Answer, TokenStream, Turn
from mmm_export.runtime.context import Context
from mmm_export.runtime.generation_options import GenerationOptions


class Generation(Answer, Iterator[str]):
    """The pieces of one answer, none empty, none ending within a character.

    The work happens in `next`. The session is usable after the last piece, whatever the reason, and holds the tokens sampled so far.
    """

    def __init__(
        self, context: Context, turn: Turn, options: GenerationOptions, stop_ids: frozenset[int], stream: TokenStream
    ) -> None:
        super().__init__(context, turn, options, stop_ids, stream)
        self._run = self._answer()

    def __next__(self) -> str:
        if self._reason is None and self._context.writer is not self:
            self.cancel()
        if self._reason == "cancelled":
            raise StopIteration
        try:
            return next(self._run)
        except StopIteration:
            raise
        except BaseException:
            self.cancel()
            raise

    def _answer(self) -> Iterator[str]:
        begin = time.perf_counter()
        logits = self.read_turn()
        while True:
            piece = self.take(logits)
            self.clock(time.perf_counter() - begin)
            if piece:
                yield piece
            if self._reason is not None:
                return
            begin = time.perf_counter()
            logits = self._context.feed(np.zeros(0, np.int64))
