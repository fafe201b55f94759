"""One model, one context: feed tokens, sample answers, save and load the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import MmmError
from mmm_export.manifest import Manifest
from mmm_export.runtime.answer import Turn
from mmm_export.runtime.backend import Backend
from mmm_export.runtime.context import Context
from mmm_export.runtime.generation import Generation
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.opening import DEFAULT_CHUNK_TOKENS, open_model
from mmm_export.runtime.prompt_encoder import PromptEncoder
from mmm_export.runtime.state_cache import DEFAULT_MAX_BYTES, StateCache
from mmm_export.runtime.state_file import read_state, write_state
from mmm_export.runtime.state_layout import state_layout

if TYPE_CHECKING:
    from mmm_export.images import ImageSource
    from mmm_export.text import Tokenizer


class Session:
    """One model and the context of one sequence.

    `prefill` and `step` feed token ids and return logits; `generate` asks a question and streams the answer. Both go on
    where the last call ended, until `reset`. A call that fails leaves the context as it was. Not for several threads at
    once. Use it as a context manager, or call `close`.

    Example:
        with Session.open("build/bundle") as session:
            for piece in session.generate("What is in the picture?", ["photo.jpg"]):
                print(piece, end="")

    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | EngineManifest,
        backend: Backend,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        kernels: Path | None = None,
    ) -> None:
        """Put a session on top of a backend; most callers want `Session.open`."""
        self._manifest = manifest
        self._kernels = kernels
        self._backend: Backend | None = backend
        self._prompts = PromptEncoder(folder, manifest)
        self._cache: StateCache | None = None
        capacity = manifest.max_tokens if manifest.model.attention_layers else None
        self._context = Context(manifest.model, backend, capacity=capacity, chunk_tokens=chunk_tokens)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        providers: Sequence[str] | None = None,
        chunk_tokens: int | None = None,
        threads: int | None = None,
        kernels: str | Path = "auto",
        check_content: bool = True,
    ) -> Session:
        """Open a bundle with ONNX Runtime, or an engine with the TensorRT that it was built for.

        Args:
            path: folder written by `mmm-export onnx` or `mmm-export trt`. An engine takes neither providers nor threads.
            providers: execution providers in order of preference, such as "cuda"; None for the CPU.
            chunk_tokens: a prompt is read in chunks of so many tokens; memory grows with it and not with the prompt. None: 512, on
                a CUDA GPU 4096.
            threads: to compute with; None for one a core.
            kernels: what computes the scan of linear layers. "auto": the library of `mmm-export plugins build` when there is one
                that fits, else the function body in the graph; "none": the body; or the path of a libmmm_onnxruntime.so.
                Of an engine: its own plugin, or the path of the libmmm_tensorrt.so to load instead.
            check_content: compare the SHA-256 of every file with the manifest, some seconds for gigabytes.

        Raises:
            BundleError: no bundle, damaged, of another version, or nothing that this machine can run.
            EngineError, MissingPackageError: likewise for an engine; see `mmm_export.runtime.tensorrt.opening`.
            OptionError: a value that is not allowed, a provider that ONNX Runtime does not have, or no such library.
            KernelError: the kernel library cannot be used.

        """
        model = open_model(
            path,
            providers=providers,
            chunk_tokens=chunk_tokens,
            threads=threads,
            kernels=kernels,
            check_content=check_content,
        )
        return cls(model.folder, model.manifest, model.backend, chunk_tokens=model.chunk_tokens, kernels=model.kernels)

    @property
    def manifest(self) -> Manifest | EngineManifest:
        """What the bundle or engine is."""
        return self._manifest

    @property
    def kernels(self) -> Path | None:
        """The library that computes the scan; None when the function body in the graph does."""
        return self._kernels

    @property
    def tokens(self) -> int:
        """Tokens in the context: fed ones, and sampled ones of answers."""
        return self._open_context.tokens

    @property
    def capacity(self) -> int | None:
        """Tokens the context can hold; None for a linear model, whose memory does not grow with it."""
        return self._context.capacity

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence: conv and SSM states, and KV caches at their full capacity.

        The session holds two such sets of buffers: a run reads one and writes the other.
        """
        return sum(tensor.bytes for tensor in state_layout(self._manifest))

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises BundleError when it has none, TokenizerError when its files are damaged."""
        return self._prompts.tokenizer

    def prefill(self, input_ids: ArrayLike, pixel_values: ArrayLike | None = None) -> NDArray[np.float32]:
        """Update the context with tokens and images, and return the logits of the last token, (vocab,).

        May be called again to go on; the result does not depend on how a prompt is cut into calls.

        Args:
            input_ids: (T,) integers, at least one.
            pixel_values: (tiles, 3, S, S) float32 as `encode` gives them; their image tokens are all in `input_ids`.

        Raises:
            PromptError: ids, images and KV cache do not fit each other; the context is unchanged.
            MmmError: the engine failed and the context is unchanged, or the session is closed or needs a `reset`.

        """
        context = self._open_context
        ids, pixels = self._prompts.checked(input_ids, pixel_values)
        context.writer = None
        return context.feed(ids, pixels)

    def step(self, token_id: int) -> NDArray[np.float32]:
        """Update the context with one token and return its logits, (vocab,).

        Raises:
            PromptError: the id is outside the vocabulary or an image token's, or the KV cache is full.
            MmmError: as `prefill`.

        """
        spec, context = self._manifest.model, self._open_context
        limit = spec.vocab_size + spec.special_tokens
        if type(token_id) is not int or not 0 <= token_id < limit or token_id == spec.image_token_id:
            return self.prefill([token_id])  # which says what is wrong, or takes what is no plain number
        context.writer = None
        return context.feed(np.array([token_id], np.int64))

    def reset(self) -> None:
        """Forget the context."""
        self._open_context.reset()

    def save_state(self, path: Path | str) -> None:
        """Write the context to a file that `load_state` takes: a saved conversation, or a prompt read in advance.

        Raises:
            OutputError: the file cannot be written.

        """
        write_state(path, self._manifest, self._open_context.snapshot())

    def load_state(self, path: Path | str) -> None:
        """Update the context to a saved one.

        Raises:
            StateFileError: damaged, or of another bundle; the context is unchanged.

        """
        context = self._open_context
        context.restore(read_state(path, self._manifest))

    def use_state_cache(
        self,
        folder: Path | str,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Let `generate` keep the states of system text and images in a folder, and read a known beginning from there.

        Args: see `mmm_export.runtime.state_cache.StateCache`. Raises OptionError as it does.
        """
        self._cache = StateCache(folder, self._manifest, max_bytes=max_bytes, report=report)

    def encode(
        self, prompt: str, images: Sequence[ImageSource] = (), *, max_tiles: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Turn a question and its images into what `prefill` takes, as the first turn of a conversation.

        Args:
            prompt: the question; `<image>` marks the place of each image, none puts them in front.
            images: files, their bytes, or PIL images.
            max_tiles: cut each image into at most so many tiles; None for the model's own limit.

        Returns: ids (T,) int64 that begin with the beginning-of-text token, and tiles (tiles, 3, S, S) or None.

        Raises:
            PromptError: empty, not valid Unicode, or images and marks do not match.
            ImageError: a file is no usable image.
            OptionError: max_tiles is out of range.
            BundleError: the bundle has no tokenizer, or a chat template that is not known.
            TokenizerError: the bundle's tokenizer files are damaged.

        """
        return self._prompts.encode(prompt, images, max_tiles)

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
        *,
        max_tiles: int | None = None,
    ) -> Generation:
        """Ask a question and stream the answer. Updates the context as the result is iterated.

        An empty context gets the whole chat prompt, system text included. Otherwise the question is the next turn of
        the conversation: the previous answer is closed with `<|im_end|>` unless it ended so by itself, and only the new
        turn is read. The tokens are those of the whole conversation encoded at once, but for one thing: the previous
        answers stay as they were sampled, even where the tokenizer would have cut their text otherwise.

        Args:
            prompt: the question, see `encode`.
            images: of this question.
            options: how to sample and when to stop; None is greedy, up to 256 tokens.
            max_tiles: see `encode`.

        Returns: an iterator of text that afterwards has `finish_reason`, `text`, `token_ids` and `statistics`.

        Raises:
            PromptError: empty, not valid Unicode, too long for the KV cache, or images and marks do not match.
            ImageError: a file is no usable image.
            OptionError: max_tiles is out of range, or a stop id outside the vocabulary.
            BundleError: the bundle has no tokenizer, or a chat template that is not known.
            TokenizerError: the bundle's tokenizer files are damaged.
            MmmError: the session is closed. Iterating raises it too: the engine failed, its logits are not usable, or
                the session needs a `reset`.

        """
        begin = time.perf_counter()
        context = self._open_context
        options = options or GenerationOptions()
        stop_ids = self._prompts.stop_ids(options)
        if context.tokens == 0:
            ids, pixels = self.encode(prompt, images, max_tiles=max_tiles)
        else:
            ids, pixels = self._prompts.encode_next_turn(prompt, images, max_tiles, context.last_token)
        ids, pixels = self._prompts.checked(ids, pixels)
        context.check_room(len(ids))
        from mmm_export.text import TextStream
        from mmm_export.text.prompt import TURN_START

        start = self.tokenizer.find(TURN_START) if self._cache else None
        turn = Turn(ids, pixels, time.perf_counter() - begin, self._cache, start)
        return Generation(context, turn, options, stop_ids, TextStream(self.tokenizer))

    def close(self) -> None:
        """Free the model. The session cannot be used afterwards; closing it again is fine."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open_context(self) -> Context:
        if self._backend is None:
            raise MmmError("the session is closed", hint="open it again with Session.open")
        return self._context
