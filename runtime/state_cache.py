"""A folder of saved states of prompt prefixes: a prompt that begins as an earlier one did is read from where they part.

A file is named by the model, its tokens and the hash of those tokens and image tiles, so nothing but the content decides what
fits. Files appear whole (`output_file`), so any number of processes may share a folder; the oldest used go first when it is full.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import OptionError, OutputError, StateFileError
from mmm_export.runtime.context import Context, ContextSnapshot
from mmm_export.runtime.state_file import read_state, write_state
from mmm_export.runtime.state_layout import ModelFolder

DEFAULT_MAX_BYTES = 2 << 30
_FILE = re.compile(r"([0-9a-f]{16})-(\d{1,10})-([0-9a-f]{32})\.state")

Ids = NDArray[np.int64]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class _Entry:
    path: Path
    tokens: int
    digest: str


class StateCache:
    """States of prompt prefixes, for one bundle, in a folder that other bundles and processes may use too.

    Args:
        folder: made when the first state is stored.
        manifest: of the bundle; a state fits no other.
        max_bytes: of all files in the folder together; a state that is larger alone is not stored.
        report: told of a file that was ignored, in one sentence; None warns.

    Raises:
        OptionError: max_bytes is no positive number, or the folder is a file.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: ModelFolder,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError("the state cache is no folder", found=f"a file {self.folder}", wanted="a folder")
        if type(max_bytes) is not int or max_bytes < 1:
            raise OptionError("max_bytes is out of range", found=repr(max_bytes), wanted="a whole number of at least 1")
        self._manifest = manifest
        self._model = manifest.model_sha256[:16]
        self._max_bytes = max_bytes
        self._report = report or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3))

    def longest(self, ids: Ids, pixels: Pixels | None) -> ContextSnapshot | None:
        """Return the state of the longest stored prefix of a prompt that leaves at least one token to read.

        A file that is damaged is reported, removed, and the next best taken.

        Args:
            ids: (T,) of the prompt.
            pixels: (tiles, 3, S, S) of its images, or None.
        """
        digests = _PrefixDigests(ids, pixels, self._manifest)
        for entry in sorted(self._entries(), key=lambda entry: -entry.tokens):
            if entry.tokens >= len(ids) or digests.of(entry.tokens) != entry.digest:
                continue
            try:
                snapshot = read_state(entry.path, self._manifest)
                if snapshot.tokens != entry.tokens or snapshot.unfed:
                    raise StateFileError("it holds another number of tokens than its name says")
            except StateFileError as error:
                if entry.path.exists():  # else another process removed it: nothing is wrong
                    self._report(f"ignored {entry.path} of the state cache: {error.what}")
                    _remove(entry.path)
                continue
            with suppress(OSError):
                os.utime(entry.path)  # it was used: others go first
            return snapshot
        return None

    def store(self, ids: Ids, pixels: Pixels | None, context: Context) -> None:
        """Store the state of a context that has read `ids` and nothing else; what cannot be written is reported."""
        digest = _PrefixDigests(ids, pixels, self._manifest).of(len(ids))
        path = self.folder / f"{self._model}-{len(ids)}-{digest}.state"
        if digest is None or path.exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state(path, self._manifest, context.snapshot())
            self._evict(path)
        except (OSError, OutputError) as error:
            if not path.exists():  # else another process stored the same meanwhile
                self._report(f"the state cache {self.folder} cannot be written: {error}")

    def _entries(self) -> Iterable[_Entry]:
        """List the stored states of this bundle."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                match = _FILE.fullmatch(path.name)
                if match and match[1] == self._model:
                    yield _Entry(path, int(match[2]), match[3])

    def _evict(self, newest: Path) -> None:
        """Remove the files that were not used for longest, of any bundle, until the folder is within its bytes."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name):
                with suppress(OSError):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        found.sort(key=lambda item: (item[2] == newest, item[0]))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self._max_bytes:
                return
            _remove(path)
            total -= size


class _PrefixDigests:
    """Hashes of the beginnings of one prompt: its ids, and the tiles that its image tokens stand for."""

    def __init__(self, ids: Ids, pixels: Pixels | None, manifest: ModelFolder) -> None:
        self._ids = ids
        self._pixels = pixels
        self._image_tokens = np.cumsum(ids == manifest.model.image_token_id)
        self._per_tile = manifest.model.vision.tokens_per_tile
        self._tiles: dict[int, bytes] = {}

    def of(self, tokens: int) -> str | None:
        """Return the digest of the first `tokens` tokens; None where that cuts a tile, whose rest could not be read."""
        if not 1 <= tokens <= len(self._ids):
            return None
        tiles, rest = divmod(int(self._image_tokens[tokens - 1]), self._per_tile)
        if rest:
            return None
        digest = hashlib.sha256(np.ascontiguousarray(self._ids[:tokens], "<i8").tobytes())
        for tile in range(tiles):
            digest.update(self._tile(tile))
        return digest.hexdigest()[:32]

    def _tile(self, index: int) -> bytes:
        if index not in self._tiles:
            assert self._pixels is not None
            self._tiles[index] = hashlib.sha256(np.ascontiguousarray(self._pixels[index]).tobytes()).digest()
        return self._tiles[index]


def read_prompt(
    context: Context, cache: StateCache, ids: Ids, pixels: Pixels | None, boundaries: Iterable[int]
) -> tuple[NDArray[np.float32], int]:
    """Feed a whole prompt to an empty context, from the longest stored prefix on, and store the prefixes at `boundaries`.

    Whatever goes wrong, the context is empty afterwards.

    Args:
        context: which has no tokens yet; updated.
        cache: where prefixes are looked for and stored.
        ids: (T,), checked before.
        pixels: (tiles, 3, S, S) of their image tokens, or None.
        boundaries: numbers of tokens after which the state is worth keeping: where another prompt may go on differently.

    Returns: the logits of the last token, (vocab,), and how many tokens came from the cache.
    """
    assert context.tokens == 0
    per_tile = context.spec.vision.tokens_per_tile
    writer = context.writer
    try:
        snapshot = cache.longest(ids, pixels)
        cached = 0
        if snapshot is not None:
            context.restore(snapshot)
            cached = snapshot.tokens
        begin = cached
        for end in [*sorted({n for n in boundaries if cached < n < len(ids)}), len(ids)]:
            done = int(np.count_nonzero(ids[:begin] == context.spec.image_token_id)) // per_tile
            count = int(np.count_nonzero(ids[begin:end] == context.spec.image_token_id))
            if count % per_tile:
                continue  # it would cut a tile
            tiles = None if pixels is None or not count else pixels[done : done + count // per_tile]
            logits = context.feed(ids[begin:end], tiles)
            if end < len(ids):
                cache.store(ids[:end], pixels, context)
            begin = end
    except BaseException:
        context.reset()
        raise
    context.writer = writer
    return logits, cached


def boundaries_of(ids: Ids, image_token: int, turn_start: int | None) -> tuple[int, ...]:
    """Find where a chat prompt may be continued otherwise: behind the system text, and behind the last image.

    Args:
        ids: (T,).
        image_token: id of the tokens that stand for images.
        turn_start: id of `<|im_start|>`; None when the vocabulary has none.
    """
    found: list[Any] = []
    if turn_start is not None:
        found += np.flatnonzero(ids == turn_start)[1:2].tolist()
    found += (np.flatnonzero(ids == image_token)[-1:] + 1).tolist()
    return tuple(int(n) for n in found if n)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
