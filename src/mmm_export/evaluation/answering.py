"""Who answers: a checkpoint by PyTorch, a bundle or an engine by the runtime. Greedy, each question in an empty context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmm_export import names
from mmm_export.errors import BundleError, OptionError, PromptError
from mmm_export.images import ImageSource, load_image, tiles_from_image

if TYPE_CHECKING:
    from mmm_export.model.decoder import MmMamba
    from mmm_export.text import Tokenizer

MOST_NEW_TOKENS = 16  # unless asked for more: answers that can be right or wrong are short
IN_MEMORY = 1 << 28  # values: a model below that is held in float32, so that its weights are not cast for every token

Answer = Callable[[str, Sequence[ImageSource]], str]
AnswerMany = Callable[[Iterable[tuple[str, Sequence[ImageSource]]]], Iterator[tuple[int, str]]]


@dataclass(frozen=True)
class AnswerOptions:
    """How a model is run.

    Attributes:
        max_new_tokens: at most so many tokens an answer.
        max_tiles: cut each image into at most so many; None for the model's own limit.
        threads: None for one a core.
        providers: of ONNX Runtime, for a bundle.
        kernels: what computes the scan of a bundle, as `Session.open` takes it.
    """

    max_new_tokens: int = MOST_NEW_TOKENS
    max_tiles: int | None = None
    threads: int | None = None
    providers: tuple[str, ...] = ()
    kernels: str | Path = "auto"


@contextmanager
def opened(model: Path, options: AnswerOptions) -> Iterator[tuple[str, Answer]]:
    """Open a model; yields what it is ("checkpoint", "bundle" or "engine") and a function that answers.

    Raises:
        BundleError: the folder holds no model.
        MmmError: the model cannot be opened.
    """
    if (model / names.MANIFEST_FILE).is_file():
        with _session(model, options) as (kind, answer):
            yield kind, answer
    elif (model / names.CONFIG_FILE).is_file():
        yield "checkpoint", _torch_answer(model, options)
    else:
        raise BundleError(
            f"{model} holds no model",
            found="a folder with neither" if model.is_dir() else "no such folder",
            wanted=f"{names.CONFIG_FILE} of a checkpoint, or {names.MANIFEST_FILE} of a bundle or an engine",
        )


@contextmanager
def opened_many(model: Path, options: AnswerOptions, rows: int) -> Iterator[tuple[str, AnswerMany]]:
    """Open a bundle that answers so many questions at once; yields what it is, and a function from questions to (number, answer).

    Raises:
        OptionError: a checkpoint or an engine, which answer one at a time.
        MmmError: the model cannot be opened.
    """
    from mmm_export.runtime import BatchSession, GenerationOptions, Question

    if not (model / names.MANIFEST_FILE).is_file():
        raise OptionError(
            "only a bundle answers several questions at once", found=f"{model}, which is no bundle", wanted="--batch 1"
        )
    generation = GenerationOptions(max_new_tokens=options.max_new_tokens)
    with BatchSession.open(
        model, rows=rows, providers=list(options.providers) or None, threads=options.threads, kernels=options.kernels
    ) as batch:

        def answers(questions: Iterable[tuple[str, Sequence[ImageSource]]]) -> Iterator[tuple[int, str]]:
            asked = (Question(text, tuple(images), generation, options.max_tiles) for text, images in questions)
            for done in batch.answers(asked):
                if done.error is not None:
                    raise done.error
                assert done.answer is not None
                yield done.number, done.answer.text

        yield "bundle", answers


@contextmanager
def _session(model: Path, options: AnswerOptions) -> Iterator[tuple[str, Answer]]:
    from mmm_export.runtime import GenerationOptions, Session

    generation = GenerationOptions(max_new_tokens=options.max_new_tokens)
    with Session.open(
        model, providers=list(options.providers) or None, threads=options.threads, kernels=options.kernels
    ) as session:

        def answer(question: str, images: Sequence[ImageSource]) -> str:
            session.reset()
            return "".join(session.generate(question, images, generation, max_tiles=options.max_tiles))

        kind = "bundle" if (model / names.DECODER_FILE).is_file() else "engine"
        yield kind, answer


def _torch_answer(folder: Path, options: AnswerOptions) -> Answer:
    """Answer with PyTorch in float32."""
    import torch

    from mmm_export.model.checkpoint import Checkpoint
    from mmm_export.model.weights import load_model
    from mmm_export.text import TextStream, Tokenizer, chat_prompt
    from mmm_export.text.prompt import TURN_END

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(folder)
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(checkpoint)
    if checkpoint.parameters < IN_MEMORY:
        model = model.float()
        model.ropes = model.make_ropes(model.spec)  # their float64 angles were rounded with the rest
    vision = model.spec.vision
    stops = {index for index in (tokenizer.find(TURN_END), tokenizer.eos_id) if index is not None and index >= 0}

    def answer(question: str, images: Sequence[ImageSource]) -> str:
        tiles = [tiles_from_image(load_image(image), vision, max_tiles=options.max_tiles) for image in images]
        prompt = chat_prompt(
            question, tile_counts=[len(part) for part in tiles], tokens_per_tile=vision.tokens_per_tile
        )
        pixels = np.concatenate(tiles) if tiles else None
        said = _greedy(model, tokenizer, prompt, pixels, stops, options.max_new_tokens)
        stream = TextStream(tokenizer)
        return "".join([*(stream.push(token) for token in said), stream.flush()])

    return answer


def _greedy(model: MmMamba, tokenizer: Tokenizer, prompt: str, pixels: Any, stops: set[int], most: int) -> list[int]:
    """Give the tokens of an answer, without the one that ends it."""
    import torch

    ids = tokenizer.encode(prompt)
    if max(ids) >= model.spec.vocab_size:
        raise PromptError("the prompt has a token that the model does not know", found=f"id {max(ids)}")
    said: list[int] = []
    with torch.inference_mode():
        nothing = torch.zeros(0, model.spec.hidden_size, dtype=model.dtype)
        features = nothing if pixels is None else model.image_features(torch.from_numpy(pixels))
        states = model.initial_states(1, len(ids) + most)
        past = torch.zeros(1, dtype=torch.int32)
        embeds = model.embed(torch.tensor([ids]), features)
        logits, states = model.prefill(embeds, torch.tensor([len(ids)], dtype=torch.int32), states, past)
        past = past + len(ids)
        while (token := int(logits[0, -1].argmax())) not in stops:
            said.append(token)
            if len(said) == most:
                break
            logits, states = model.step(torch.tensor([token]), states, past)
            past = past + 1
    return said
