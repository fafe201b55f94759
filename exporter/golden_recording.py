"""Makes golden values by PyTorch in float32: for a bundle that is exported, or for a comparison with a checkpoint at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmm_export.errors import PromptError
from mmm_export.exporter.golden import Golden, GoldenExample, states_by_name
from mmm_export.exporter.recorded import Example
from mmm_export.exporter.recording import record_torch
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.weights import load_model
from mmm_export.names import TOKENIZER_MODEL_FILE
from mmm_export.progress import Progress
from mmm_export.spec import ModelSpec
from mmm_export.text import Tokenizer, chat_prompt

NEW_TOKENS = 8
PROMPT = "What is in this picture?"
TEXT_PROMPT = "Name the four seasons, and one thing that each of them is known for."


def golden_from_examples(
    source: Checkpoint,
    source_sha256: str,
    examples: dict[str, Example],
    *,
    new_tokens: int = NEW_TOKENS,
    progress: Progress,
) -> Golden:
    """Run examples, by name, through the checkpoint; weights stay memory-mapped.

    Args:
        source: the checkpoint.
        source_sha256: its hash.
        examples: by name.
        new_tokens: greedy tokens to step over after each prompt.
        progress: told of.
    """
    rows = []
    model = load_model(source)
    for name, example in examples.items():
        with progress.stage(f"run PyTorch: {name}"):
            wanted, forced = record_torch(model, example, new_tokens=new_tokens)
        wanted.states = states_by_name(wanted.states)
        rows.append(GoldenExample(name, example, wanted, tuple(forced)))
    return Golden(source.folder.resolve().name, source_sha256, tuple(rows))


def golden_examples(folder: Path, spec: ModelSpec, max_tokens: int) -> dict[str, Example]:
    """A question about an image of one tile, a generated pattern, and one about nothing but text.

    Args:
        folder: that may hold the tokenizer; without one, ids spread over the vocabulary stand in.
        spec: the model.
        max_tokens: capacity of the KV caches, 0 for a model without.

    Raises:
        PromptError: the KV cache is too small for an image and a few words.
    """
    size, channels = spec.vision.tile_size, spec.vision.channels
    pattern = pattern_tile(spec)
    nothing = np.zeros((0, channels, size, size), np.float32)
    made = {}
    for name, tiles, text in (("image and text", pattern, PROMPT), ("text", nothing, TEXT_PROMPT)):
        if (folder / TOKENIZER_MODEL_FILE).is_file():
            prompt = chat_prompt(
                text, tile_counts=[len(tiles)] if len(tiles) else [], tokens_per_tile=spec.vision.tokens_per_tile
            )
            ids = Tokenizer.from_folder(folder).encode(prompt)
        else:
            ids = spread_ids(spec, tiles=len(tiles))
        if max_tokens and len(ids) + NEW_TOKENS > max_tokens:
            raise PromptError(
                "the golden prompts do not fit the KV cache of the bundle",
                found=f"{len(ids)} tokens and {NEW_TOKENS} new ones",
                wanted=f"at most {max_tokens}",
                hint="export with a larger --max-tokens, or without --golden",
            )
        made[name] = Example(np.asarray(ids, np.int64), tiles)
    return made


def pattern_tile(spec: ModelSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """One tile of smooth waves, of the magnitude of a normalised image: (1, 3, S, S)."""
    S = spec.vision.tile_size
    rows, columns = np.mgrid[0:S, 0:S] / S
    waves = [np.sin(2 * np.pi * (k * rows + (4 - k) * columns)) for k in range(1, 1 + spec.vision.channels)]
    return np.stack(waves)[None].astype(np.float32)


def spread_ids(spec: ModelSpec, *, tiles: int = 1) -> list[int]:
    """Text ids spread over the vocabulary around the image tokens of some tiles."""
    text = [int(i) for i in np.linspace(3, spec.vocab_size - 1, 24) if int(i) != spec.image_token_id]
    return text[:12] + [spec.image_token_id] * spec.vision.tokens_per_tile * tiles + text[12:]
