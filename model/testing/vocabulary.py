"""The test vocabulary: a small SentencePiece model, then the fifteen special tokens in the released order."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.errors import OptionError
from mmm_export.model.testing.corpus import SENTENCES

BASE_SPECIAL_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
ADDED_TOKENS = ("<img>", "</img>", names.IMAGE_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
SPECIAL_TOKENS = BASE_SPECIAL_TOKENS + ADDED_TOKENS
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 inside the SentencePiece model

BYTE_PIECES = 256
FEWEST_PIECES = len(CONTROL_TOKENS) + BYTE_PIECES + 26
MOST_TRAINED_PIECES = 1000  # the corpus is too short for more; larger vocabularies are filled up


def image_token_id(vocab_size: int) -> int:
    """Where a test vocabulary of that many ids has <IMG_CONTEXT>; 92546 of 92553, as released."""
    return vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(names.IMAGE_TOKEN)


def vocab_size_for(tokenizer_model: Path) -> int:
    """Give the vocab_size of a model that uses this tokenizer.model: its pieces and the fifteen special tokens."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).get_piece_size()) + len(
        SPECIAL_TOKENS
    )


def write_tokenizer(folder: Path, vocab_size: int, source: Path | None = None) -> None:
    """Write the four tokenizer files of a checkpoint with `vocab_size` ids into a folder.

    Args:
        folder: an existing folder.
        vocab_size: pieces plus fifteen.
        source: a tokenizer.model to copy; None trains a small one, always the same for the same size.

    Raises:
        OptionError: the given tokenizer has another number of pieces, or the vocabulary is too small to train.
    """
    if source is None:
        model = trained_model(vocab_size - len(SPECIAL_TOKENS))
    elif (wanted := vocab_size_for(source)) != vocab_size:
        raise OptionError(
            f"{source} does not fit the model",
            found=f"vocab_size {vocab_size}",
            wanted=f"vocab_size {wanted}: its pieces and {len(SPECIAL_TOKENS)} special tokens",
        )
    else:
        model = source.read_bytes()
    (folder / names.TOKENIZER_MODEL_FILE).write_bytes(model)
    first = vocab_size - len(SPECIAL_TOKENS)
    ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
    _write_json(folder / names.ADDED_TOKENS_FILE, {token: ids[token] for token in sorted(ADDED_TOKENS)}, indent=2)
    _write_json(folder / names.TOKENIZER_CONFIG_FILE, _tokenizer_config(ids), indent=2)
    _write_json(folder / names.SPECIAL_TOKENS_FILE, _special_tokens_map(), indent=2)


@functools.cache
def trained_model(pieces: int) -> bytes:
    """Train a tokenizer.model with exactly that many pieces: BPE with byte fallback, unk 0, bos 1, eos 2, no pad.

    Raises:
        OptionError: fewer pieces than bytes and letters need.
    """
    if pieces < FEWEST_PIECES:
        raise OptionError(
            "the vocabulary is too small for a tokenizer",
            found=f"vocab_size {pieces + len(SPECIAL_TOKENS)}",
            wanted=f"at least {FEWEST_PIECES + len(SPECIAL_TOKENS)}: 256 bytes, letters and special tokens",
            hint="write the checkpoint without one: tokenizer=False",
        )
    import sentencepiece

    trained = min(pieces, MOST_TRAINED_PIECES)
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences((trained - BYTE_PIECES - len(CONTROL_TOKENS)) // 2)),
        model_writer=stream,
        model_type="bpe",
        vocab_size=trained,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    # Protocol buffers concatenate: more entries of ModelProto.pieces (field 1) behind the message extend the list.
    return stream.getvalue() + b"".join(_filler_piece(i) for i in range(trained, pieces))


def _sentences(characters: int) -> list[str]:
    """Strip the corpus of all but its most frequent characters; text with others falls back to bytes."""
    kept = {character for character, _ in Counter("".join(SENTENCES)).most_common(characters)}
    return ["".join(filter(kept.__contains__, sentence)) for sentence in SENTENCES]


def _filler_piece(i: int) -> bytes:
    """Encode a piece that no text ever uses as one entry of ModelProto.pieces: {piece, score, type UNUSED}."""
    text = f"[UNUSED_TOKEN_{i}]".encode()
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e4) + b"\x18\x05"
    return b"\x0a" + bytes([len(body)]) + body


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    placed = {token: i for i, token in enumerate(CONTROL_TOKENS)} | ids
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in placed.items()},
        "additional_special_tokens": [*reversed(BASE_SPECIAL_TOKENS), *ADDED_TOKENS],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 8192,
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }


def _special_tokens_map() -> dict[str, Any]:
    def entry(token: str) -> dict[str, Any]:
        return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    return {
        "additional_special_tokens": [*reversed(BASE_SPECIAL_TOKENS), *ADDED_TOKENS],
        "bos_token": entry("<s>"),
        "eos_token": entry("</s>"),
        "pad_token": entry("</s>"),
        "unk_token": entry("<unk>"),
    }


def _write_json(path: Path, data: Any, *, indent: int) -> None:
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
