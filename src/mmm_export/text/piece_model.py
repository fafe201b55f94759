"""tokenizer.model read as bytes: the pieces, their kinds and the few flags that encoding and decoding depend on.

The file is a protocol buffer message; its layout is public (sentencepiece_model.proto) and small enough to read without
the protobuf package. Reading it ourselves gives one clear error for a damaged file, and lets releases of SentencePiece
that refuse InternLM2's vocabulary load it (see `PieceModel.null_id`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmm_export.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space inside a piece
_DEFAULT_UNKNOWN_TEXT = " ⁇ "
_NULL_STAND_IN = "\ufdd0"  # a Unicode noncharacter: no text in any language has it, so it collides with no piece

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_PIECE_TEXT, _PIECE_KIND = 1, 3
_TRAINER_SUFFIX_SPACE, _TRAINER_UNKNOWN_TEXT = 24, 44
_TRAINER_UNK, _TRAINER_BOS, _TRAINER_EOS = 45, 46, 47
_NORMALIZER_CHARSMAP, _NORMALIZER_DUMMY_PREFIX, _NORMALIZER_TRIM = 2, 3, 4


@dataclass(frozen=True)
class PieceModel:
    """The content of a tokenizer.model.

    `pieces[i]` is the text of id i and `kinds[i]` one of NORMAL .. BYTE. `serialized` is what SentencePiece is given.
    It differs from the file only where the vocabulary holds the piece "\\0", as InternLM2's does: SentencePiece 0.2.2
    refuses such a model and 0.2.3 never produces the piece, while 0.2.1 and before encode a null character as it.
    `null_id` is that piece's id, to be put in the place of `null_byte_id`, the byte piece that a null character
    otherwise becomes.
    """

    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    serialized: bytes
    unknown_text: str
    drops_first_space: bool  # decoding drops one space before the first piece that has text
    trims_spaces: bool  # decoding drops every leading space
    unk_id: int
    bos_id: int  # -1: none
    eos_id: int  # -1: none
    null_id: int | None
    null_byte_id: int | None


def read_piece_model(path: Path) -> PieceModel:
    """Read a tokenizer.model. Raises TokenizerError when it is missing, damaged, or needs what is not supported."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{path.parent} has no tokenizer",
            found=f"no {path.name} in it" if path.parent.is_dir() else "no such folder",
            wanted="the SentencePiece vocabulary of the checkpoint",
            hint=f"copy {path.name} from the checkpoint into this folder",
        ) from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read", found=f"{error.strerror}") from error
    try:
        return piece_model_from_bytes(data)
    except ValueError as error:
        raise TokenizerError(
            f"{path} is damaged or no SentencePiece model",
            found=f"{error} ({len(data)} bytes)",
            wanted="a SentencePiece vocabulary",
            hint=f"copy {path.name} from the checkpoint again",
        ) from error


def piece_model_from_bytes(data: bytes) -> PieceModel:
    """Parse the bytes of a tokenizer.model. Raises ValueError saying what is wrong with them."""
    pieces: list[str] = []
    kinds: list[int] = []
    spans: list[tuple[int, int]] = []  # of each piece's whole record, for the null piece
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    position = 0
    for number, value, end in _fields(data):
        if number == _PIECES:
            text, kind = _piece(_message(value, "piece"), len(pieces))
            pieces.append(text)
            kinds.append(kind)
            spans.append((position, end))
        elif number == _TRAINER:
            trainer.update((n, v) for n, v, _ in _fields(_message(value, "trainer")))
        elif number == _NORMALIZER:
            normalizer.update((n, v) for n, v, _ in _fields(_message(value, "normalizer")))
        elif number == _DENORMALIZER and any(
            n == _NORMALIZER_CHARSMAP and v for n, v, _ in _fields(_message(value, "denormalizer"))
        ):
            raise ValueError("it rewrites decoded text (denormalizer), which is not supported")
        position = end
    _check_vocabulary(pieces, kinds)
    if trainer.get(_TRAINER_SUFFIX_SPACE):
        raise ValueError("it writes spaces after words (treat_whitespace_as_suffix), which is not supported")

    ids = {piece: i for i, piece in enumerate(pieces)}
    null_id = ids.get("\0")
    null_byte_id = ids.get("<0x00>") if null_id is not None else None
    if null_id is not None:
        start, end = spans[null_id]
        data = data[:start] + _control_piece(_NULL_STAND_IN) + data[end:]
    trims = bool(normalizer.get(_NORMALIZER_TRIM, 1))
    return PieceModel(
        pieces=tuple(pieces),
        kinds=tuple(kinds),
        serialized=data,
        unknown_text=_text(trainer.get(_TRAINER_UNKNOWN_TEXT, _DEFAULT_UNKNOWN_TEXT.encode()), "unknown surface"),
        drops_first_space=bool(normalizer.get(_NORMALIZER_DUMMY_PREFIX, 1)) or trims,
        trims_spaces=trims,
        unk_id=kinds.index(UNKNOWN),
        bos_id=_control_id(ids, kinds, trainer.get(_TRAINER_BOS, b"<s>")),
        eos_id=_control_id(ids, kinds, trainer.get(_TRAINER_EOS, b"</s>")),
        null_id=null_id,
        null_byte_id=null_byte_id,
    )


def _check_vocabulary(pieces: list[str], kinds: list[int]) -> None:
    if not pieces:
        raise ValueError("it has no pieces")
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        raise ValueError(f"piece {twice!r} occurs twice")
    if kinds.count(UNKNOWN) != 1:
        raise ValueError(f"it has {kinds.count(UNKNOWN)} unknown pieces instead of one")
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind == BYTE and not _is_byte_piece(piece):
            raise ValueError(f"byte piece {piece!r} is not of the form <0x00>")


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">" and set(piece[3:5]) <= set("0123456789ABCDEF")


def _control_id(ids: dict[str, int], kinds: list[int], name: int | bytes) -> int:
    """Find a control piece by its name, as SentencePiece itself finds <s> and </s>; -1 without."""
    index = ids.get(_text(name, "control piece"), -1)
    return index if index >= 0 and kinds[index] == CONTROL else -1


def _piece(record: bytes, index: int) -> tuple[str, int]:
    text: str | None = None
    kind = NORMAL
    for number, value, _ in _fields(record):
        if number == _PIECE_TEXT:
            text = _text(value, f"piece {index}")
        elif number == _PIECE_KIND:
            if not isinstance(value, int) or not NORMAL <= value <= BYTE:
                raise ValueError(f"piece {index} is of unknown kind {value!r}")
            kind = value
    if not text:
        raise ValueError(f"piece {index} is empty")
    return text, kind


def _control_piece(text: str) -> bytes:
    content = text.encode()
    record = bytes([_PIECE_TEXT << 3 | 2, len(content)]) + content + bytes([_PIECE_KIND << 3, CONTROL])
    return bytes([_PIECES << 3 | 2, len(record)]) + record


def _message(value: int | bytes, what: str) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"a {what} is a number")
    return value


def _text(value: int | bytes, what: str) -> str:
    try:
        return _message(value, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8") from error


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """Fields of one protocol buffer message: number, value, position after it. Fixed-width values come as bytes."""
    position, size = 0, len(data)
    while position < size:
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield key >> 3, number, position
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {position} starts no known field")
        if position + length > size:
            raise ValueError(f"it ends inside a field of {length} bytes at byte {position}")
        yield key >> 3, data[position : position + length], position + length
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"it ends inside a number at byte {position}")
