"""An answer while it is written: logits in, pieces of text out, and afterwards why it ended and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import MmmError, OptionError
from mmm_export.runtime.context import Context
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.sampling import Sampler
from mmm_export.runtime.state_cache import StateCache, boundaries_of, read_prompt
from mmm_export.runtime.stop_strings import StopScanner

FinishReason = Literal["stop_token", "stop_string", "length", "context_full", "cancelled", "failed"]


@dataclass(frozen=True)
class GenerationStatistics:
    """How much was read and written, and how fast.

    Attributes:
        prompt_tokens: read for this turn, image tokens included.
        image_tokens: those of them that stand for images.
        cached_tokens: those of them that were not read, since the state cache had their state.
        context_tokens: in the context now; of a row that has been given back, when it was.
        new_tokens: sampled, a stop token included.
        first_token_s: seconds from the call to the first sampled token: images, prompt, sampling; None before it.
        decode_s: seconds spent on all tokens after the first, without what the caller does in between.

    """

    prompt_tokens: int
    image_tokens: int
    context_tokens: int
    new_tokens: int
    first_token_s: float | None
    decode_s: float
    cached_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first for each second; None when there were none."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


@dataclass(frozen=True)
class Turn:
    """What an answer reads first: (T,) ids, their tiles (tiles, 3, S, S), and the seconds it took to make them.

    With a `cache` an empty context is read through it; `turn_start` is the id of `<|im_start|>` if there is one.
    """

    ids: NDArray[np.int64]
    pixels: NDArray[np.float32] | None
    preparation_s: float
    cache: StateCache | None = None
    turn_start: int | None = None


class TokenStream(Protocol):
    """Turns tokens into text that never ends within a character; `mmm_export.text.TextStream` is one."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class Answer:
    """An answer in the making, which whoever runs the model feeds with logits.

    `finish_reason` says why it ended: "stop_token", "stop_string", "length" (max_new_tokens), "context_full" (KV cache), "cancelled"
    (by `cancel`, Ctrl-C, or because the context was used for something else meanwhile), or "failed", for the reason in `error`.
    """

    def __init__(
        self, context: Context, turn: Turn, options: GenerationOptions, stop_ids: frozenset[int], stream: TokenStream
    ) -> None:
        spec = context.spec
        # The model reads an image token only together with an image, so an answer cannot contain one.
        banned = (spec.image_token_id,) if spec.image_token_id < spec.vocab_size else ()
        self._context = context
        self._turn = turn
        self._options = options
        self._stop_ids = stop_ids
        self._stream = stream
        self._scanner = StopScanner(options.stop)
        self._sampler = Sampler(options, banned)
        self._reason: FinishReason | None = None
        self._error: MmmError | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._sampled = 0
        self._first_token_s: float | None = None
        self._decode_s = 0.0
        self._cached = 0
        self._kept_tokens: int | None = None
        context.writer = self

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it has not."""
        return self._reason

    @property
    def error(self) -> MmmError | None:
        """What went wrong when the reason is "failed"."""
        return self._error

    @property
    def text(self) -> str:
        """The answer so far: all pieces in one."""
        return self._text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens so far, without the stop token that ended it."""
        return tuple(self._token_ids)

    @property
    def statistics(self) -> GenerationStatistics:
        """Counts and times so far."""
        ids = self._turn.ids
        return GenerationStatistics(
            prompt_tokens=len(ids),
            image_tokens=int(np.count_nonzero(ids == self._context.spec.image_token_id)),
            context_tokens=self._context.tokens if self._kept_tokens is None else self._kept_tokens,
            new_tokens=self._sampled,
            first_token_s=self._first_token_s,
            decode_s=self._decode_s,
            cached_tokens=self._cached,
        )

    def cancel(self) -> None:
        """End the answer where it is."""
        if self._reason is None:
            self._reason = "cancelled"

    def read_turn(self) -> NDArray[np.float32]:
        """Update the context with the turn and return the logits of its last token, (vocab,). Raises as `Context.feed`."""
        turn, context = self._turn, self._context
        if turn.cache is None or context.tokens:
            return context.feed(turn.ids, turn.pixels)
        boundaries = boundaries_of(turn.ids, context.spec.image_token_id, turn.turn_start)
        logits, self._cached = read_prompt(context, turn.cache, turn.ids, turn.pixels, boundaries)
        return logits

    def take(self, logits: NDArray[np.float32]) -> str:
        """Sample a token, which is then part of the context, and return the text that has become certain, maybe none.

        Raises:
            MmmError: the logits are not usable.

        """
        token = self._sampler.choose(logits, self._context.seen)
        has_room = self._context.add_sampled(token)
        self._sampled += 1
        piece = ""
        if token in self._stop_ids:
            self._reason = "stop_token"
        else:
            self._token_ids.append(token)
            piece = self._scanner.push(self._text_of(token))
            if self._scanner.is_stopped:
                self._reason = "stop_string"
            elif self._sampled >= self._options.max_new_tokens:
                self._reason = "length"
            elif not has_room:
                self._reason = "context_full"
        if self._reason is not None:
            piece += self._scanner.push(self._stream.flush()) + self._scanner.flush()
        self._text += piece
        return piece

    def fail(self, error: MmmError) -> None:
        """End the answer because of an error that concerns it alone."""
        self._reason, self._error = "failed", error

    def let_go(self) -> None:
        """Remember the context as it is, which will be another's."""
        self._kept_tokens = self._context.tokens

    def clock(self, seconds: float) -> None:
        """Count the seconds that the token just sampled took; those of the first include images and prompt."""
        if self._first_token_s is None:
            self._first_token_s = self._turn.preparation_s + seconds
        else:
            self._decode_s += seconds

    def _text_of(self, token: int) -> str:
        try:
            return self._stream.push(token)
        except OptionError:  # a row of the model's output that no token uses, as in a padded vocabulary
            return ""
