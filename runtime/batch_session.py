"""One model and several sequences: rows that take a question each, are decoded together, and are free again when their answer ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import BatchFullError, MmmError, OptionError
from mmm_export.interrupts import signals_deferred
from mmm_export.manifest import Manifest
from mmm_export.runtime.answer import Answer, Turn
from mmm_export.runtime.backend import BatchBackend
from mmm_export.runtime.context import Context
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.opening import DEFAULT_CHUNK_TOKENS, open_model
from mmm_export.runtime.prompt_encoder import PromptEncoder
from mmm_export.runtime.state_layout import state_layout

if TYPE_CHECKING:
    from mmm_export.images import ImageSource
    from mmm_export.text import Tokenizer

DEFAULT_ROWS = 8


@dataclass(frozen=True)
class Question:
    """What `BatchSession.answers` asks; see `Session.generate`."""

    prompt: str
    images: tuple[ImageSource, ...] = ()
    options: GenerationOptions | None = None
    max_tiles: int | None = None


@dataclass(frozen=True)
class Answered:
    """A question, by its number from 0, and what came of it: an answer, or the error that kept it from being asked or ended it."""

    number: int
    question: Question
    answer: Answer | None
    error: MmmError | None


class BatchSession:
    """One model and several sequences, a row for each.

    `add` reads a question into a free row, and `step` gives every answer in the making one more token, all in one run of the
    model. When an answer ends its row is free again, whatever the others do. `answers` does both until a whole list is
    answered; `prefill`, `advance` and `free` go token by token. Rows know nothing of each other: an answer is what a `Session`
    would have given, but for the order in which sums are taken. Not for several threads at once. Use it as a context manager, or
    call `close`.

    Example:
        with BatchSession.open("build/bundle", rows=8) as batch:
            for done in batch.answers(Question("What is it?", (image,)) for image in images):
                print(done.number, done.answer.text if done.answer else done.error)

    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | EngineManifest,
        backend: BatchBackend,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        kernels: Path | None = None,
    ) -> None:
        """Put a batch on top of a backend; most callers want `BatchSession.open`."""
        self._manifest = manifest
        self._kernels = kernels
        self._backend: BatchBackend | None = backend
        self._prompts = PromptEncoder(folder, manifest)
        capacity = manifest.max_tokens if manifest.model.attention_layers else None
        self._contexts = tuple(
            Context(manifest.model, row, capacity=capacity, chunk_tokens=chunk_tokens) for row in backend.rows
        )
        self._answers: dict[int, Answer] = {}  # by row
        self._held: set[int] = set()  # rows that the caller drives
        self._logits: dict[int, NDArray[np.float32]] = {}  # by row, what the next token of an answer is sampled from
        self._pieces: list[tuple[Answer, str]] = []  # that `step` has not handed out

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        rows: int = DEFAULT_ROWS,
        providers: Sequence[str] | None = None,
        chunk_tokens: int | None = None,
        threads: int | None = None,
        kernels: str | Path = "auto",
        check_content: bool = True,
    ) -> BatchSession:
        """Open a bundle for several sequences; an engine takes one row.

        Args: `rows` that there shall be, each with its own state; the others, and Raises, as of `Session.open`.
        """
        model = open_model(
            path,
            rows=rows,
            providers=providers,
            chunk_tokens=chunk_tokens,
            threads=threads,
            kernels=kernels,
            check_content=check_content,
        )
        return cls(model.folder, model.manifest, model.batch, chunk_tokens=model.chunk_tokens, kernels=model.kernels)

    @property
    def manifest(self) -> Manifest | EngineManifest:
        """What the bundle or engine is."""
        return self._manifest

    @property
    def kernels(self) -> Path | None:
        """The library that computes the scan; None when the function body in the graph does."""
        return self._kernels

    @property
    def tokenizer(self) -> Tokenizer:
        """As of `Session`."""
        return self._prompts.tokenizer

    @property
    def rows(self) -> int:
        """Sequences that there is room for."""
        return len(self._contexts)

    @property
    def free_rows(self) -> int:
        """Rows that nothing is in."""
        return self.rows - len(self._answering()) - len(self._held)

    @property
    def is_busy(self) -> bool:
        """Whether `step` has something to do or to hand out."""
        return bool(self._answering() or self._pieces)

    @property
    def capacity(self) -> int | None:
        """Tokens that each row can hold; None for a linear model."""
        return self._contexts[0].capacity

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one row, as of `Session`; there are two such sets of buffers for each row."""
        return sum(tensor.bytes for tensor in state_layout(self._manifest))

    def tokens(self, row: int) -> int:
        """Return the tokens in a row's context; 0 for a free row."""
        if not 0 <= row < self.rows:
            raise OptionError("there is no such row", found=str(row), wanted=f"0 to {self.rows - 1}")
        return self._contexts[row].tokens

    def add(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
        *,
        max_tiles: int | None = None,
    ) -> Answer:
        """Ask a question in a free row: read it and sample the first token of its answer. The other rows wait meanwhile.

        Args: see `Session.generate`.

        Returns: the answer in the making. `cancel` ends it before the next step; the row is free as soon as it has a `finish_reason`.

        Raises:
            BatchFullError: no row is free.
            MmmError: as `Session.generate` and the first piece of its answer; the row is still free, and the other rows are
                as they were.

        """
        begin = time.perf_counter()
        row = self._free_row()
        context = self._contexts[row]
        options = options or GenerationOptions()
        stop_ids = self._prompts.stop_ids(options)
        ids, pixels = self._prompts.checked(*self._prompts.encode(prompt, images, max_tiles))
        context.check_room(len(ids))
        from mmm_export.text import TextStream

        answer = Answer(context, Turn(ids, pixels, 0.0), options, stop_ids, TextStream(self.tokenizer))
        try:
            piece = answer.take(answer.read_turn())
        except BaseException:
            context.reset()
            raise
        answer.clock(time.perf_counter() - begin)
        self._answers[row] = answer
        self._hand_out(answer, piece)
        self._sweep()
        return answer

    def step(self) -> list[tuple[Answer, str]]:
        """Give every answer in the making one more token, and return the pieces of text that came since the last step.

        An answer whose logits are not usable ends as "failed", with its `error`; the others go on.

        Raises:
            MmmError: the model failed, and no answer has changed: it may be tried again. Or the session is closed.

        """
        backend = self._open_backend
        self._sweep()
        begin = time.perf_counter()
        tokens = {row: self._contexts[row].last_token for row in self._answers if row not in self._logits}
        if tokens:
            with signals_deferred():  # or a Ctrl-C could lose logits whose tokens the states already stand for
                self._logits |= self._run(backend, tokens)
        for row in tuple(self._logits):
            self._take(row, begin)
        self._sweep()
        pieces, self._pieces = self._pieces, []
        return pieces

    def answers(self, questions: Iterable[Question]) -> Iterator[Answered]:
        """Answer questions, as many at a time as there are free rows, each in the order in which its answer ends.

        A question that cannot be asked or answered comes back with its error; the others do not notice. Leaving the iterator early
        cancels the answers that are under way.

        Raises: as `step`.
        """
        waiting = enumerate(questions)
        asked: dict[Answer, tuple[int, Question]] = {}
        is_over = False
        try:
            while True:
                while not is_over and self.free_rows:
                    number, question = next(waiting, (-1, None))
                    if question is None:
                        is_over = True
                        break
                    self._open_backend  # noqa: B018 - a closed session is no fault of the question
                    try:
                        answer = self.add(
                            question.prompt, question.images, question.options, max_tiles=question.max_tiles
                        )
                    except MmmError as error:
                        yield Answered(number, question, None, error)
                    else:
                        asked[answer] = number, question
                for answer in [answer for answer in asked if answer.finish_reason is not None]:
                    yield Answered(*asked.pop(answer), answer, answer.error)
                if is_over and not asked:
                    return
                if not asked and not self.is_busy:
                    raise self._full()  # and nothing here will ever make room
                self.step()
        finally:
            for answer in asked:
                answer.cancel()

    def prefill(self, input_ids: ArrayLike, pixel_values: ArrayLike | None = None) -> tuple[int, NDArray[np.float32]]:
        """Read token ids into a free row, which then is the caller's until `free`.

        Args: see `Session.prefill`.

        Returns: the row, and the logits of the last token, (vocab,).

        Raises:
            BatchFullError: no row is free.
            MmmError: as `Session.prefill`; the row is still free.

        """
        row = self._free_row()
        ids, pixels = self._prompts.checked(input_ids, pixel_values)
        logits = self._contexts[row].feed(ids, pixels)
        self._held.add(row)
        return row, logits

    def advance(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """Update rows of the caller's with one token each, in one run of the model, and return their logits, (vocab,) by row.

        Raises:
            OptionError: a row that `prefill` has not given, or that was given back.
            PromptError: a token that no model can take, or a full KV cache; no row has changed.
            MmmError: the model failed, and no row has changed; or the session is closed.

        """
        backend = self._open_backend
        for row in tokens:
            self._check_held(row)
            self._contexts[row].check_room(1)
        if not tokens:
            return {}
        self._prompts.checked(list(tokens.values()), None)
        with signals_deferred():
            return self._run(backend, {row: int(token) for row, token in tokens.items()})

    def free(self, row: int) -> None:
        """Forget a row that `prefill` gave. Raises OptionError when it did not."""
        self._check_held(row)
        self._held.remove(row)
        self._contexts[row].reset()

    def close(self) -> None:
        """Free the model. The session cannot be used afterwards; closing it again is fine."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    def __enter__(self) -> BatchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open_backend(self) -> BatchBackend:
        if self._backend is None:
            raise MmmError("the session is closed", hint="open it again with BatchSession.open")
        return self._backend

    def _answering(self) -> list[int]:
        return [row for row, answer in self._answers.items() if answer.finish_reason is None]

    def _free_row(self) -> int:
        """Return the first free row: a step then runs no more rows than it must. Raises BatchFullError."""
        self._open_backend  # noqa: B018 - which says that it is closed
        self._sweep()
        for row in range(self.rows):
            if row not in self._answers and row not in self._held:
                return row
        raise self._full()

    def _full(self) -> BatchFullError:
        return BatchFullError(
            "no row of the batch is free",
            found=f"{len(self._answers)} answers under way, {len(self._held)} rows held, of {self.rows}",
            hint="step until an answer ends, free a row, or open the batch with more rows",
        )

    def _check_held(self, row: int) -> None:
        if row not in self._held:
            raise OptionError(
                f"row {row} is not one that prefill has given",
                found=f"rows {', '.join(map(str, sorted(self._held)))}" if self._held else "no such row",
                hint="rows of answers go on with step",
            )

    def _run(self, backend: BatchBackend, tokens: dict[int, int]) -> dict[int, NDArray[np.float32]]:
        logits = backend.step(tokens)
        for row, token in tokens.items():
            self._contexts[row].note_step(token)
        return logits

    def _take(self, row: int, begin: float) -> None:
        """Sample the next token of a row's answer from the logits that wait for it."""
        answer = self._answers[row]
        logits = self._logits.pop(row)
        try:
            piece = answer.take(logits)
        except MmmError as error:
            answer.fail(error)
            return
        except BaseException:
            answer.cancel()  # between logits and token; the others' wait for the next step
            raise
        answer.clock(time.perf_counter() - begin)
        self._hand_out(answer, piece)

    def _hand_out(self, answer: Answer, piece: str) -> None:
        if piece:
            self._pieces.append((answer, piece))

    def _sweep(self) -> None:
        """Empty the rows whose answers have ended."""
        for row, answer in tuple(self._answers.items()):
            if answer.finish_reason is not None:
                answer.let_go()
                self._contexts[row].reset()
                self._logits.pop(row, None)
                del self._answers[row]
