"""From a question and its images to what a model reads, and the ids that end an answer: by the tokenizer and template of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmm_export import names
from mmm_export.errors import BundleError, OptionError
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.state_layout import ModelFolder
from mmm_export.runtime.token_input import check_image_tokens, ids_from_input, pixels_from_input

if TYPE_CHECKING:
    from mmm_export.images import ImageSource
    from mmm_export.text import Tokenizer

# Text and images are imported where they are used: whoever feeds token ids needs neither sentencepiece nor Pillow.

Ids = NDArray[np.int64]
Pixels = NDArray[np.float32]


class PromptEncoder:
    """Turns questions into token ids (T,) int64 and image tiles (tiles, 3, S, S) float32, None for no images.

    Args:
        folder: bundle or engine, whose tokenizer is opened when it is first needed.
        manifest: of that folder.
    """

    def __init__(self, folder: Path, manifest: ModelFolder) -> None:
        self._folder = folder
        self._spec = manifest.model
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError when it has none, TokenizerError when its files are damaged."""
        if self._tokenizer is None:
            if not (self._folder / names.TOKENIZER_MODEL_FILE).is_file():
                raise BundleError(
                    f"{self._folder} has no tokenizer",
                    found=f"no {names.TOKENIZER_MODEL_FILE}",
                    wanted=", ".join(names.TOKENIZER_FILES),
                    hint="export from a checkpoint folder that has them, or feed token ids with prefill",
                )
            from mmm_export.text import Tokenizer

            self._tokenizer = Tokenizer.from_folder(self._folder)
        return self._tokenizer

    def encode(self, prompt: str, images: Sequence[ImageSource], max_tiles: int | None) -> tuple[Ids, Pixels | None]:
        """Encode the first turn of a conversation; see `Session.encode`."""
        from mmm_export.text import chat_prompt

        return self._encode_with(chat_prompt, prompt, images, max_tiles, add_bos=True)

    def encode_next_turn(
        self, prompt: str, images: Sequence[ImageSource], max_tiles: int | None, last_token: int
    ) -> tuple[Ids, Pixels | None]:
        """Like `encode` for a turn that follows others, of which `last_token` is the last id.

        Special tokens split a text before it is cut into pieces, so what follows `<|im_end|>` has the same ids alone.
        """
        from mmm_export.text import turn_prompt
        from mmm_export.text.prompt import TURN_END

        ids, pixels = self._encode_with(turn_prompt, prompt, images, max_tiles, add_bos=False)
        closing = self.tokenizer.encode(TURN_END, add_bos=False)  # several ids where the vocabulary has no such token
        if closing != [last_token]:
            ids = np.concatenate([np.asarray(closing, np.int64), ids])
        return ids, pixels

    def checked(self, input_ids: ArrayLike, pixel_values: ArrayLike | None) -> tuple[Ids, Pixels | None]:
        """Return ids and tiles as arrays that fit the model and each other. Raises PromptError."""
        spec = self._spec
        ids = ids_from_input(input_ids, spec)
        pixels = pixels_from_input(pixel_values, spec)
        check_image_tokens(ids, pixels, spec)
        return ids, pixels

    def stop_ids(self, options: GenerationOptions) -> frozenset[int]:
        """Return the ids that end an answer. Raises OptionError for one outside the vocabulary."""
        if options.stop_ids is None:
            from mmm_export.text.prompt import TURN_END

            ends = (self.tokenizer.find(TURN_END), self.tokenizer.eos_id)
            return frozenset(token for token in ends if token is not None and token >= 0)
        vocabulary = self._spec.vocab_size
        for token in options.stop_ids:
            if token >= vocabulary:
                raise OptionError(
                    "a stop id is outside the vocabulary", found=str(token), wanted=f"0 to {vocabulary - 1}"
                )
        return frozenset(options.stop_ids)

    def _check_template(self) -> None:
        if self._spec.template != names.TEMPLATE:
            raise BundleError(
                "the model's chat template is not known",
                found=repr(self._spec.template),
                wanted=names.TEMPLATE,
                hint="write the prompt yourself: session.prefill(session.tokenizer.encode(text))",
            )

    def _tiles(self, source: ImageSource, max_tiles: int | None) -> NDArray[np.float32]:
        from mmm_export.images import load_image, tiles_from_image

        pixels: Pixels = tiles_from_image(load_image(source), self._spec.vision, max_tiles=max_tiles)
        return pixels

    def _encode_with(
        self,
        write: Callable[..., str],
        prompt: str,
        images: Sequence[ImageSource],
        max_tiles: int | None,
        *,
        add_bos: bool,
    ) -> tuple[Ids, Pixels | None]:
        self._check_template()
        tiles = [self._tiles(source, max_tiles) for source in _image_list(images)]
        counts = [len(pixels) for pixels in tiles]
        text = write(prompt, tile_counts=counts, tokens_per_tile=self._spec.vision.tokens_per_tile)
        ids = np.asarray(self.tokenizer.encode(text, add_bos=add_bos), np.int64)
        return ids, np.concatenate(tiles) if tiles else None


def _image_list(images: Sequence[ImageSource]) -> list[ImageSource]:
    """One image given instead of a list is that image, and not its letters or pixels."""
    single = (
        isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "read") or not isinstance(images, Iterable)
    )
    return [cast("ImageSource", images)] if single else list(images)
