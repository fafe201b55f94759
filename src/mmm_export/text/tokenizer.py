"""InternLM2's tokenizer: SentencePiece for text, a table of added tokens around it.

It equals the slow Hugging Face tokenizer id for id and character for character, so the reference's habits are kept
where they show: every text between two added tokens is encoded on its own; special tokens typed by a user
(`<|im_end|>`) become special tokens; decoding tidies spaces before punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from mmm_export import names
from mmm_export.errors import OptionError, PromptError, TokenizerError
from mmm_export.text.added_tokens import AddedTokens, read_added_tokens
from mmm_export.text.piece_model import PieceModel, read_piece_model

# Replaced one after the other over the whole text, so the order matters.
_TIDY = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def tidy_spaces(text: str) -> str:
    """Remove spaces before punctuation and English contractions, as the reference does to everything it decodes."""
    for before, after in _TIDY:
        text = text.replace(before, after)
    return text


class Tokenizer:
    """Text to token ids and back.

    Args:
        model: the SentencePiece vocabulary.
        added: the tokens around it.

    Attributes:
        vocab_size: one more than the highest id; the model's tables need at least that many rows.
        bos_id: put in front of every encoded text, -1 when the vocabulary has none.
        eos_id: end of text, -1 when the vocabulary has none.
        special_ids: ids that `decode(skip_special_tokens=True)` and streams leave out.

    """

    def __init__(self, model: PieceModel, added: AddedTokens) -> None:
        self.model = model
        self.added = added
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model.serialized)
        self._texts: dict[int, str] = dict(enumerate(model.pieces))
        self._texts.update((index, token.content) for index, token in added.by_id.items())
        self._ids = {text: index for index, text in enumerate(model.pieces)} | added.ids
        # The longest first: at each place the regular expression then takes the longest token.
        longest_first = sorted(added.ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self.vocab_size = max(self._texts) + 1
        self.bos_id = self._role_id(model.bos_id, "bos_token")
        self.eos_id = self._role_id(model.eos_id, "eos_token")
        self.special_ids = frozenset(self._ids[text] for text in added.special)
        # These break the text into parts joined by spaces; the other special tokens stay inside a part.
        self.separate_ids = frozenset(
            index
            for text, index in added.ids.items()
            if text not in added.special or (text in added.extra and index >= len(model.pieces))
        )

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read tokenizer.model and the JSON files beside it, in a checkpoint or a bundle. Raises TokenizerError."""
        folder = Path(folder)
        path = folder / names.TOKENIZER_MODEL_FILE
        model = read_piece_model(path)
        added = read_added_tokens(folder, model)
        try:
            tokenizer = cls(model, added)
        except RuntimeError as error:  # what SentencePiece throws; it checks more than we do
            raise TokenizerError(
                f"{path} is damaged",
                found=str(error),
                wanted="a SentencePiece vocabulary",
                hint=f"copy {path.name} from the checkpoint again",
            ) from error
        if added.add_bos and tokenizer.bos_id < 0:
            raise TokenizerError(
                f"{path} has no token for the beginning of a text",
                found="add_bos_token is on",
                wanted="a control piece <s>, or add_bos_token false in tokenizer_config.json",
            )
        return tokenizer

    def _role_id(self, piece_id: int, role: str) -> int:
        return piece_id if piece_id >= 0 else self._ids.get(self.added.roles.get(role, ""), -1)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Turn a text into token ids.

        `add_bos` puts in front and behind what the checkpoint's tokenizer asks for, in the released models `<s>` in
        front; False gives the text's own tokens. Raises PromptError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                "the text is not valid Unicode",
                found=f"{text[error.start]!a} at character {error.start}",
                wanted="text that can be written as UTF-8",
            ) from error
        ids: list[int] = []
        for part in self._parts(text):
            index = self.added.ids.get(part)
            if index is not None:
                ids.append(index)
            elif part:
                ids.extend(self._encode_plain(part))
        if add_bos and self.added.add_bos:
            ids.insert(0, self.bos_id)
        if add_bos and self.added.add_eos:
            ids.append(self.eos_id)
        return ids

    def _parts(self, text: str) -> list[str]:
        """Cut the text at its added tokens and apply their flags; the parts are added tokens, plain text, or empty."""
        if self._split is None:
            return [text]
        parts = [part for part in self._split.split(text) if part]
        for i, part in enumerate(parts):
            if part not in self.added.ids:
                continue
            token = self.added.by_id[self.added.ids[part]]
            if not (token.lstrip or token.rstrip or token.single_word):
                continue
            left = parts[i - 1] if i > 0 else ""
            right = parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            # A single_word token that touches a word becomes part of it. The neighbours count as they were unstripped.
            if token.single_word and left and left[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                parts[i] = ""
        return parts

    def _encode_plain(self, text: str) -> list[int]:
        # By the pieces' texts, not their numbers: an added token may have taken over a piece's number.
        unknown = self.model.unk_id
        ids = [self._ids.get(piece, unknown) for piece in self._processor.encode(text, out_type=str)]
        if self.model.null_byte_id is not None and self.model.null_id is not None and "\0" in text:
            ids = [self.model.null_id if index == self.model.null_byte_id else index for index in ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Turn token ids into text.

        With special tokens kept, the reference's spaces appear around them (` <s>Hello`, `<img> <IMG_CONTEXT>`).
        Bytes that are not UTF-8 become U+FFFD. Raises OptionError for an id that is not in the vocabulary.
        """
        parts: list[str] = []
        run: list[str] = []
        for index in ids:
            text = self.token_text(index)
            if skip_special_tokens and index in self.special_ids:
                continue
            if index not in self.separate_ids:
                run.append(text)
                continue
            if run and (joined := self._join(run)):
                parts.append(joined)
            parts.append(text)
            run = []
        if run:
            parts.append(self._join(run))
        whole = " ".join(parts)
        return tidy_spaces(whole) if self.added.clean_up_spaces else whole

    def _join(self, tokens: Sequence[str]) -> str:
        """Join tokens none of which stands apart. A special token puts a space in front of the plain text before it."""
        text = ""
        plain: list[str] = []
        after_special = False
        for token in tokens:
            if token not in self.added.special:
                plain.append(token)
                after_special = False
                continue
            text += ("" if after_special else " ") + self._decode_plain(plain) + token
            plain = []
            after_special = True
        return tidy_spaces(text + self._decode_plain(plain))

    def _decode_plain(self, pieces: Sequence[str]) -> str:
        text: str = self._processor.decode(pieces) if pieces else ""
        return text

    def token_text(self, index: int) -> str:
        """Look up the text of a token id, such as `▁hello`. Raises OptionError for an unknown id."""
        text = self._texts.get(index)
        if text is None:
            raise OptionError(
                f"token id {index} is not in the vocabulary",
                found=f"id {index}",
                wanted=f"0 to {self.vocab_size - 1}",
                hint="the tokenizer and the model may come from different checkpoints",
            )
        return text

    def find(self, text: str) -> int | None:
        """Look up the id of a token by its text; None if there is none."""
        return self._ids.get(text)

    def token_id(self, text: str) -> int:
        """Look up the id of a token by its text, such as `<|im_end|>`. Raises TokenizerError if there is none."""
        index = self.find(text)
        if index is None:
            raise TokenizerError(
                f"the tokenizer has no token {text!r}",
                found=f"{len(self._texts)} other tokens",
                wanted="the tokenizer files of an mmMamba checkpoint",
            )
        return index
