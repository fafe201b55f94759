"""The vocabulary of the demo models: SentencePiece BPE trained on the text of the task, and the released special tokens."""

from __future__ import annotations

import functools
import io
from pathlib import Path

from mmm_export.distillation.digits.architecture import VOCAB_SIZE
from mmm_export.distillation.digits.questions import all_texts
from mmm_export.model.testing.vocabulary import SPECIAL_TOKENS, write_tokenizer

# More of the words, so that a question in slightly other words is cut into words too, and not into letters.
SENTENCES = (
    *["system user assistant (user) (assistant)"] * 20,
    "Describe the image. What is in the picture?",
    "Which number is in the first row? Which number is in the last column?",
    "How many patches are red, green, blue, yellow, purple or white?",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;!?'()-",
)


@functools.cache
def digits_vocabulary() -> bytes:
    """Train tokenizer.model; the same on every machine.

    The default system text of the chat template is one piece: in its letters it would be longer than image and question.
    """
    import sentencepiece

    from mmm_export.text.piece_model import SPACE
    from mmm_export.text.prompt import DEFAULT_SYSTEM

    questions, answers = all_texts()
    # In brackets an answer is a word without a space before it, as it is behind the line end where the model writes it.
    bare = [f"({answer})" for answer in answers] * 20
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*questions, *answers, *bare, *SENTENCES]),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[DEFAULT_SYSTEM.replace(" ", SPACE)],
        num_threads=1,
        minloglevel=2,
    )
    return stream.getvalue()


def write_digits_tokenizer(folder: Path) -> None:
    """Write the four tokenizer files of a demo model into a folder."""
    source = folder / "tokenizer.model"
    source.write_bytes(digits_vocabulary())
    write_tokenizer(folder, VOCAB_SIZE, source)
