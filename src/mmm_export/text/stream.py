"""Token ids to text as they come, without waiting for the whole answer and without ever showing half a character."""

from __future__ import annotations

from mmm_export.text.piece_model import BYTE, CONTROL, SPACE, UNKNOWN, PieceModel
from mmm_export.text.tokenizer import Tokenizer, tidy_spaces

_BROKEN = "\ufffd"


class TextStream:
    """Turns token ids into text, one at a time.

    The pieces returned by `push` and the one returned by `flush`, put together, are
    `tokenizer.decode(ids, skip_special_tokens=True)`. Special tokens are left out because the reference writes a space
    in front of the text *before* a special token, which cannot be known in time. The cost of a token does not grow with
    the number of tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._run = _RunDecoder(self._tokenizer.model)
        self._run_tidy = _Tidy()
        self._run_has_tokens = self._run_has_text = False
        self._has_parts = False  # text or a token stands before the current run
        self._whole_tidy = _Tidy() if self._tokenizer.added.clean_up_spaces else None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain by now. Raises OptionError for an unknown id."""
        text = self._tokenizer.token_text(token_id)
        if token_id in self._tokenizer.special_ids:
            return ""
        if token_id in self._tokenizer.separate_ids:
            text = self._end_run() + (" " if self._has_parts else "") + text
            self._has_parts = True
        else:
            self._run_has_tokens = True
            text = self._joined(self._run_tidy.push(self._run.push(token_id)))
        return text if self._whole_tidy is None else self._whole_tidy.push(text)

    def flush(self) -> str:
        """End the text; returns what was held back, broken characters as U+FFFD. The stream is then as new."""
        empty_run = self._run_has_tokens and self._has_parts
        text = self._end_run()
        if empty_run and not text and not self._run_had_text:
            text = " "  # a last run without text is still joined by its space
        if self._whole_tidy is not None:
            text = self._whole_tidy.push(text) + self._whole_tidy.flush()
        self._begin()
        return text

    def _joined(self, text: str) -> str:
        """Text of the current run, with the space that joins the run to what stands before it."""
        if not text or self._run_has_text:
            return text
        self._run_has_text = True
        return " " + text if self._has_parts else text

    def _end_run(self) -> str:
        text = self._joined(self._run_tidy.push(self._run.flush()) + self._run_tidy.flush())
        self._run_had_text = self._run_has_text
        self._has_parts = self._has_parts or self._run_has_text
        self._run_has_tokens = self._run_has_text = False
        return text


class _RunDecoder:
    """SentencePiece's decoder, one piece at a time."""

    def __init__(self, model: PieceModel) -> None:
        self._model = model
        self._begin()

    def _begin(self) -> None:
        self._bytes = b""
        self._at_start = True  # the next piece with text may lose its leading space
        self._dropped_space = False
        self._has_text = False

    def push(self, index: int) -> str:
        kind = self._model.kinds[index]
        if kind == BYTE:
            text = self._complete_characters(int(self._model.pieces[index][3:5], 16))
        else:
            text = self._broken_characters()
            if self._dropped_space or self._has_text or text:
                self._at_start = False
            self._dropped_space = False
            text += self._piece_text(index, kind)
        self._has_text = self._has_text or bool(text)
        return text

    def flush(self) -> str:
        text = self._broken_characters()
        self._begin()
        return text

    def _piece_text(self, index: int, kind: int) -> str:
        if kind == CONTROL:
            return ""
        if kind == UNKNOWN:
            return self._model.unknown_text
        piece = self._model.pieces[index]
        if self._at_start and self._model.drops_first_space and piece.startswith(SPACE):
            piece = piece[1:]
            self._dropped_space = not self._model.trims_spaces
        return piece.replace(SPACE, " ")

    def _complete_characters(self, byte: int) -> str:
        """Add a byte; returns what can no longer become another character."""
        self._bytes += bytes([byte])
        text = ""
        while self._bytes:
            size = _character_size(self._bytes)
            if size is None:
                break
            text += self._bytes[:size].decode() if size else _BROKEN
            self._bytes = self._bytes[size or 1 :]
        return text

    def _broken_characters(self) -> str:
        # One U+FFFD for each byte of an incomplete character, as SentencePiece does it.
        text = _BROKEN * len(self._bytes)
        self._bytes = b""
        return text


def _character_size(data: bytes) -> int | None:
    """Bytes of the UTF-8 character that data is; 0: its first byte begins none; None: it is the beginning of one."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return None if error.reason == "unexpected end of data" else 0
    return len(data)


class _Tidy:
    """`tidy_spaces` on text that comes in pieces: holds back what a later piece could still change."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._before = ""  # the last character seen

    def push(self, text: str) -> str:
        if not text:
            return ""
        cut = _settled(text, self._before)
        self._before = text[-1]
        if not cut:
            self._held.append(text)
            return ""
        settled = "".join(self._held) + text[:cut]
        self._held = [text[cut:]]
        return tidy_spaces(settled)

    def flush(self) -> str:
        text = "".join(self._held)
        self._held = []
        self._before = ""
        return tidy_spaces(text)


def _settled(text: str, before: str) -> int:
    """Count the characters of text that no later text can change; `before` is the character before text, or nothing.

    Every pattern of `tidy_spaces` starts with a space, and a beginning of one ends in a space, an apostrophe, n, v or
    r. So text is settled after any other character, and after n, v or r unless a space or an apostrophe stands before
    it. That holds after each replacement too, since they remove spaces only.
    """
    for end in range(len(text), 0, -1):
        last = text[end - 1]
        if last not in " 'nvr":
            return end
        previous = text[end - 2] if end > 1 else before
        if last in "nvr" and previous not in (" ", "'"):
            return end
    return 0
