"""The chat template `internlm2-chat`, the only one that mmMamba models are trained with, and image marks in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmm_export import names
from mmm_export.errors import OptionError, PromptError

DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # no newline behind it; also what the model stops with
IMAGE_MARK = "<image>"  # what a user writes; plain text to the tokenizer
IMAGE_START = "<img>"
IMAGE_END = "</img>"


def chat_prompt(
    question: str,
    *,
    tile_counts: Sequence[int] = (),
    tokens_per_tile: int = 256,
    history: Sequence[tuple[str, str]] = (),
    system: str = DEFAULT_SYSTEM,
) -> str:
    """Write the whole text that asks a question; the tokenizer puts `<s>` in front of it.

    Every `<image>` in the questions, earlier ones first, stands for the next image. A first question without marks gets
    them in front: `<image>` and a newline for one image, lines `Image-1: <image>`, `Image-2: <image>` for several.
    Special tokens in the texts, such as `<|im_end|>`, act as special tokens, as they do in the reference: whoever puts
    foreign text into a prompt has to remove them.

    Args:
        question: what is asked now.
        tile_counts: tiles of each image of the conversation, in order.
        tokens_per_tile: vectors the model makes of one tile.
        history: earlier (question, answer) pairs, the questions with their image marks.
        system: the system text; empty leaves its turn empty.

    Raises:
        PromptError: the question is blank, marks and images disagree in number, or a text holds `<IMG_CONTEXT>`.
        OptionError: a count is below 1.

    """
    questions = [asked for asked, _ in history] + [question]
    if not history:
        questions = [_with_marks(question, len(tile_counts))]
    _check_texts(question, (system, *questions, *(answer for _, answer in history)))
    images = _image_texts(questions, tile_counts, tokens_per_tile)
    turns = [_filled(asked, images) for asked in questions]
    prompt = _turn("system", system)
    for asked, (_, answer) in zip(turns[:-1], history, strict=True):
        prompt += _turn("user", asked) + _turn("assistant", answer)
    return prompt + _turn("user", turns[-1]) + _ASSISTANT


def turn_prompt(question: str, *, tile_counts: Sequence[int] = (), tokens_per_tile: int = 256) -> str:
    """Write one more question, to continue a conversation that the model has in its state.

    What the model has read must end with the previous answer's `<|im_end|>`; this text is to be encoded without `<s>`.
    Marks and errors are those of `chat_prompt` for a first question: `tile_counts` are the new images alone.
    """
    marked = _with_marks(question, len(tile_counts))
    _check_texts(question, (marked,))
    return _turn("user", _filled(marked, _image_texts([marked], tile_counts, tokens_per_tile))) + _ASSISTANT


_ASSISTANT = f"{TURN_START}assistant\n"


def _turn(role: str, text: str) -> str:
    return f"{TURN_START}{role}\n{text}{TURN_END}"


def _with_marks(question: str, images: int) -> str:
    if images == 0 or IMAGE_MARK in question:
        return question
    if images == 1:
        return f"{IMAGE_MARK}\n{question}"
    return "".join(f"Image-{i}: {IMAGE_MARK}\n" for i in range(1, images + 1)) + question


def _check_texts(question: str, texts: Sequence[str]) -> None:
    if not question.strip():
        raise PromptError(
            "the prompt is empty",
            found=f"{question!r:.40}",
            wanted="a question",
            hint="pass text, for example --prompt 'Describe the picture.'",
        )
    for text in texts:
        if names.IMAGE_TOKEN in text:
            # It would be counted as a vector of an image, and every image after it would be out of place.
            raise PromptError(
                f"the prompt holds {names.IMAGE_TOKEN}",
                found=f"it at character {text.index(names.IMAGE_TOKEN)}",
                wanted=f"{IMAGE_MARK} where an image belongs",
                hint=f"write {IMAGE_MARK} instead, or remove it",
            )


def _image_texts(questions: Sequence[str], tile_counts: Sequence[int], tokens_per_tile: int) -> Iterator[str]:
    marks = sum(asked.count(IMAGE_MARK) for asked in questions)
    if marks != len(tile_counts):
        raise PromptError(
            "image marks and images disagree",
            found=f"{marks} {IMAGE_MARK} in the prompt, {len(tile_counts)} images",
            wanted=f"one {IMAGE_MARK} for every image",
            hint=f"write {IMAGE_MARK} in the question once for every image, or nowhere",
        )
    for name, count in (("tokens_per_tile", tokens_per_tile), *(("tile count", tiles) for tiles in tile_counts)):
        if count < 1:
            raise OptionError(f"{name} must be at least 1", found=str(count))
    return (IMAGE_START + names.IMAGE_TOKEN * (tokens_per_tile * tiles) + IMAGE_END for tiles in tile_counts)


def _filled(text: str, images: Iterator[str]) -> str:
    first, *rest = text.split(IMAGE_MARK)
    return first + "".join(next(images) + part for part in rest)
