"""The task as arrays: every sample as pixels and token ids of one fixed length, made once and kept on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.distillation.digits.assets import Assets, Bytes
from mmm_export.distillation.digits.questions import KINDS, all_texts
from mmm_export.distillation.digits.samples import Sample

LENGTH = 52  # tokens of the longest question and answer, and one to spare
PADDING = 2  # </s>, behind the last token: never looked at


@dataclass(frozen=True)
class Encoding:
    """Token ids of everything that can be asked and answered: what a machine without the tokenizer needs.

    Attributes:
        prompts: ids of the whole prompt of each question, from `<s>` to the line end where the answer begins.
        answers: ids of each answer, `<|im_end|>` last.
    """

    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, tokens_per_tile: int) -> Encoding:
        """Encode all texts of the task with a `mmm_export.text.Tokenizer`."""
        from mmm_export.text.prompt import TURN_END, chat_prompt

        questions, answers = all_texts()
        prompts = {
            text: tokenizer.encode(chat_prompt(text, tile_counts=[1], tokens_per_tile=tokens_per_tile))
            for text in questions
        }
        # With a whole conversation around it: a tokenizer may cut a text otherwise where it begins.
        whole, ids = chat_prompt(questions[0], tile_counts=[1], tokens_per_tile=tokens_per_tile), prompts[questions[0]]
        return cls(prompts, {text: tokenizer.encode(whole + text + TURN_END)[len(ids) :] for text in answers})


@dataclass(frozen=True)
class Arrays:
    """N samples.

    Attributes:
        pixels: (N, S, S, 3) RGB.
        ids: (N, LENGTH) token ids, padded behind.
        prompt_tokens: (N,) tokens before the answer.
        tokens: (N,) all tokens that are not padding.
        kinds: (N,) number of the question's kind in KINDS.
    """

    pixels: Bytes
    ids: NDArray[np.int16]
    prompt_tokens: NDArray[np.int16]
    tokens: NDArray[np.int16]
    kinds: Bytes


def arrays_from_samples(samples: Iterable[Sample], assets: Assets, encoding: Encoding) -> Arrays:
    """Draw and encode samples."""
    drawn = list(samples)
    names = list(KINDS)
    ids = np.full((len(drawn), LENGTH), PADDING, np.int16)
    prompt_tokens, tokens = np.empty(len(drawn), np.int16), np.empty(len(drawn), np.int16)
    for row, sample in enumerate(drawn):
        prompt, answer = encoding.prompts[sample.question.text], encoding.answers[sample.question.answer]
        prompt_tokens[row], tokens[row] = len(prompt), len(prompt) + len(answer)
        ids[row, : tokens[row]] = prompt + answer
    pixels = np.stack([sample.picture(assets) for sample in drawn])
    kinds = np.asarray([names.index(sample.question.kind) for sample in drawn], np.uint8)
    return Arrays(pixels, ids, prompt_tokens, tokens, kinds)
