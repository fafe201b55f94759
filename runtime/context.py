"""The running context of a session: what the state stands for, and how tokens get into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import MmmError, PromptError
from mmm_export.runtime.backend import Backend
from mmm_export.runtime.image_features import ImageFeatures
from mmm_export.spec import ModelSpec


@dataclass(frozen=True)
class ContextSnapshot:
    """Everything a context is, as it goes into a state file.

    `arrays` as of `Backend.read_state`; `tokens` those the arrays stand for; `unfed` sampled tokens that follow them;
    `last_token` the last of all (-1 for none); `seen` (vocabulary,) bool, the ids that have occurred.
    """

    arrays: dict[str, NDArray[Any]]
    tokens: int
    unfed: tuple[int, ...]
    last_token: int
    seen: NDArray[np.bool_]


class Context:
    """Feeds tokens to a backend in chunks and puts the state back when that fails.

    A sampled token is part of the context from the moment it is sampled, but the model reads it only with the next
    feed: the last token of an answer then costs nothing, and the next turn reads it together with its own tokens.

    Args:
        capacity: tokens that fit into the KV cache; None when the model has none and the context may grow for ever.
        chunk_tokens: the model reads at most so many tokens in one call, which bounds its memory.

    """

    def __init__(self, spec: ModelSpec, backend: Backend, *, capacity: int | None, chunk_tokens: int) -> None:
        self.spec = spec
        self.capacity = capacity
        self.seen = np.zeros(spec.vocab_size + spec.special_tokens, np.bool_)
        self.writer: object | None = None  # whose turn it is; a generation stops when it is no longer the writer
        self._backend = backend
        self._chunk_tokens = chunk_tokens
        self._unfed: tuple[int, tuple[int, ...]] = (0, ())  # where they belong, and the ids
        self._last_fed = -1
        self._is_broken = False

    @property
    def unfed(self) -> tuple[int, ...]:
        """Sampled tokens that the model has not read yet. Those that the state already stands for no longer count."""
        position, ids = self._unfed
        return ids[max(0, self._backend.tokens - position) :]

    @property
    def tokens(self) -> int:
        """Tokens in the context, sampled ones included."""
        return self._backend.tokens + len(self.unfed)

    @property
    def last_token(self) -> int:
        """Id of the last token, -1 when there is none."""
        return self.unfed[-1] if self.unfed else self._last_fed

    def check_room(self, count: int) -> None:
        """Refuse `count` tokens more than the KV cache has room for. Raises PromptError."""
        if self.capacity is not None and self.tokens + count > self.capacity:
            raise PromptError(
                "the context does not fit into the KV cache",
                found=f"{self.tokens} tokens in the context and {count} more",
                wanted=f"at most {self.capacity} in all",
                hint=f"reset the session, ask for less, or export with --max-tokens {self.tokens + count} or more",
            )

    def add_sampled(self, token: int) -> bool:
        """Update the context with a token that was sampled from it; False, and no change, when it is full."""
        if self.capacity is not None and self.tokens >= self.capacity:
            return False
        self.seen[token] = True
        self._unfed = (self._backend.tokens, (*self.unfed, token))
        return True

    def feed(self, ids: NDArray[np.int64], pixels: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Update the context with tokens that were checked before, and return the logits of the last, (vocab,).

        Whatever goes wrong, Ctrl-C included, the context is afterwards what it was before. The one exception is a
        Ctrl-C just after the model has read a prompt of a single chunk: then the tokens are in the context.

        Args:
            ids: (T,); may be empty when sampled tokens wait.
            pixels: (tiles, 3, S, S), as many as the ids have image tokens for.

        Raises:
            PromptError: no room for them.
            MmmError: the model failed.

        """
        self._refuse_if_broken()
        self.check_room(len(ids))
        unfed = self.unfed
        everything = np.concatenate([np.asarray(unfed, np.int64), ids]) if unfed else ids
        whole = self._backend.tokens + len(everything)
        try:
            if len(everything) == 1 and pixels is None:
                return self._backend.advance(everything, None)
            return self._read(everything, ImageFeatures(self._backend, pixels))
        finally:
            if self._backend.tokens == whole:
                self._last_fed = int(everything[-1])
                self.seen[everything] = True

    def note_step(self, token: int) -> None:
        """Update the context after its backend has read a token in a step of several rows."""
        self._last_fed = token
        self.seen[token] = True

    def _read(self, ids: NDArray[np.int64], features: ImageFeatures) -> NDArray[np.float32]:
        chunks = [ids[begin : begin + self._chunk_tokens] for begin in range(0, len(ids), self._chunk_tokens)]
        before = self._backend.tokens
        # A single call leaves the state alone when it fails, and no state is needed to go back to nothing.
        # KV cache rows are only ever added, so they need no copy.
        kept = self._backend.read_state(rows=0) if before and len(chunks) > 1 else None
        try:
            for chunk in chunks:
                images = int(np.count_nonzero(chunk == self.spec.image_token_id))
                logits = self._backend.advance(chunk, features.take(images))
        except BaseException:
            if len(chunks) > 1 and (kept is not None or self._backend.tokens != before):
                self._is_broken = True  # until the state is back; a second Ctrl-C could come in between
                if kept is None:
                    self._backend.clear()
                else:
                    self._backend.write_state(kept, before)
                self._is_broken = False
            raise
        return logits

    def reset(self) -> None:
        """Forget everything; also mends a context whose state was lost."""
        self._is_broken = True  # until all of it is done; a Ctrl-C could come in between
        self.writer = None
        self._unfed = (0, ())
        self._last_fed = -1
        self.seen[:] = False
        self._backend.clear()
        self._is_broken = False

    def snapshot(self) -> ContextSnapshot:
        """Copy the whole context."""
        self._refuse_if_broken()
        tokens = self._backend.tokens
        return ContextSnapshot(self._backend.read_state(tokens), tokens, self.unfed, self.last_token, self.seen.copy())

    def restore(self, snapshot: ContextSnapshot) -> None:
        """Update the context to a snapshot of this model, whose sizes were checked before."""
        self._is_broken = True  # as in reset
        self.writer = None
        self._backend.write_state(snapshot.arrays, snapshot.tokens)
        self._unfed = (snapshot.tokens, snapshot.unfed)
        self._last_fed = snapshot.last_token
        self.seen[:] = snapshot.seen
        self._is_broken = False

    def _refuse_if_broken(self) -> None:
        if self._is_broken:
            raise MmmError(
                "the state of this session was lost by an interrupt",
                wanted="a session with a whole state",
                hint="call reset(), or load_state() of a saved one",
            )
