"""A file of conversations, one JSON object a line, streamed from the disk by worker processes."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmm_export.distillation.batch import Batch
from mmm_export.distillation.conversation import DataError, Sample, SampleError, read_line, sample_from_conversation
from mmm_export.distillation.packing import batch_from_samples
from mmm_export.distillation.recipe import DataOptions, Recipe
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.spec import ModelSpec
from mmm_export.text import Tokenizer

SCAN_BYTES = 1 << 22


class JsonlData:
    """Conversations of a file, see conversation.py.

    Unusable samples are left out and remembered, or refused. A step then has fewer samples than others.

    Args:
        path: the file.
        spec: the model.
        tokenizer: of the model.
        options: how samples become batches.
        images: where relative image paths begin; the file's folder when None.
        dtype: of the pixels of a batch.
        strict: refuse the first sample that cannot be used.
        pin: whether batches lie in memory from which a GPU can fetch by itself.

    Attributes:
        skipped: reason by line, counted from 1, of the samples left out so far.

    Raises:
        DataError: the file cannot be read, is empty, or has no usable line; with `strict`, has an unusable one.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        options: DataOptions,
        *,
        images: Path | None = None,
        dtype: torch.dtype = torch.float32,
        strict: bool = False,
        pin: bool = False,
    ) -> None:
        self.options = options
        self.strict = strict
        self.skipped: dict[int, str] = {}
        self._pin = pin
        self._passes = _Passes(path, line_starts(path), images or path.parent, spec, tokenizer, options, dtype)
        self._check(path)

    def __len__(self) -> int:
        return len(self._passes.starts)

    def sample(self, index: int) -> Sample:
        """Read one sample. Raises SampleError."""
        return self._passes.sample(index)

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Give a batch for each list of indices, in order; raises DataError for an unusable sample where it is strict."""
        workers = self.options.workers
        loader: DataLoader[_Loaded] = DataLoader(
            self._passes,
            sampler=plan,  # any iterable does; an index is a list here
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=self._pin,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        for loaded in loader:
            self._remember(loaded.skipped)
            yield loaded.batch

    def summary(self) -> dict[str, int]:
        """Count the samples left out so far by reason, the most frequent first."""
        return dict(Counter(self.skipped.values()).most_common())

    def _remember(self, skipped: dict[int, tuple[str, str]]) -> None:
        for index, (reason, found) in skipped.items():
            if self.strict:
                raise self._refused(index, reason, found)
            self.skipped[index + 1] = reason

    def _refused(self, index: int, reason: str, found: str) -> DataError:
        return DataError(
            f"line {index + 1} of {self._passes.path} is unusable: {reason}",
            found=found,
            hint="correct or remove the line, or leave such lines out by not asking for --strict",
        )

    def _check(self, path: Path) -> None:
        """Look for the first usable line, or with `strict` for the first unusable one; tokens are counted when they are read."""
        reasons: Counter[str] = Counter()
        for index in range(len(self)):
            try:
                self._passes.check(index)
            except SampleError as error:
                if self.strict:
                    raise self._refused(index, error.reason, error.found or "") from error
                reasons[error.reason] += 1
            else:
                if not self.strict:
                    return
        if self.strict and len(self):
            return
        raise DataError(
            f"{path} has no usable sample",
            found=", ".join(f"{count} of {reason}" for reason, count in reasons.most_common(4)) or "no line",
            wanted='lines such as {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
            '{"from": "gpt", "value": "A cat."}]}',
        )


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the run still needs the batches of its current step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Loaded:
    batch: Batch
    skipped: dict[int, tuple[str, str]]

    def pin_memory(self) -> _Loaded:
        return _Loaded(self.batch.pin_memory(), self.skipped)


class _Passes(Dataset["_Loaded"]):
    """What a worker has: it makes the batch of a list of indices."""

    def __init__(
        self,
        path: Path,
        starts: NDArray[np.int64],
        images: Path,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        options: DataOptions,
        dtype: torch.dtype,
    ) -> None:
        self.path, self.starts, self.images, self.spec = path, starts, images, spec
        self.tokenizer, self.options, self.dtype = tokenizer, options, dtype
        self._opened: tuple[int, BinaryIO] | None = None

    def __getitem__(self, indices: Sequence[int]) -> _Loaded:
        samples, skipped = [], {}
        for index in indices:
            try:
                samples.append(self.sample(index))
            except SampleError as error:
                skipped[index] = (error.reason, error.found or "")
        options = self.options
        batch = batch_from_samples(
            samples, self.spec, max_tokens=options.max_tokens, packing=options.packing, dtype=self.dtype
        )
        return _Loaded(batch, skipped)

    def sample(self, index: int) -> Sample:
        options = self.options
        return sample_from_conversation(
            read_line(self._line(index)),
            self.images,
            self.spec,
            self.tokenizer,
            max_tokens=options.max_tokens,
            max_tiles=options.max_tiles,
            system=options.system,
        )

    def check(self, index: int) -> None:
        """Raise SampleError for what can be seen without reading images."""
        for image in read_line(self._line(index)).images:
            if not (self.images / image).is_file():
                raise SampleError("missing image", str(self.images / image))

    def _line(self, index: int) -> bytes:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.path.open("rb"))  # a forked worker would share its parent's position
        stream = self._opened[1]
        stream.seek(int(self.starts[index]))
        return stream.readline()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def line_starts(path: Path) -> NDArray[np.int64]:
    """Find where each line that is not blank begins. Raises DataError when the file cannot be read."""
    starts = [0]
    try:
        with path.open("rb") as stream:
            offset = 0
            while block := stream.read(SCAN_BYTES):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1
                starts.extend(ends.tolist())
                offset += len(block)
            starts = [start for start in starts if start < offset]
            found = []
            for start in starts:
                stream.seek(start)
                if stream.readline(256).strip():
                    found.append(start)
    except OSError as error:
        raise DataError(f"{path} cannot be read", found=error.strerror or str(error), wanted="a JSONL file") from error
    return np.array(found, np.int64)


def open_data(
    path: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    images: Path | None = None,
    strict: bool = False,
    pin: bool = False,
) -> JsonlData:
    """Open the data of a recipe for a model. Arguments and errors as JsonlData; TokenizerError without a tokenizer."""
    return JsonlData(
        path,
        checkpoint.spec,
        Tokenizer.from_folder(checkpoint.folder),
        recipe.data,
        images=images,
        dtype=torch.float32 if recipe.run.dtype == "fp32" else torch.bfloat16,
        strict=strict,
        pin=pin,
    )
