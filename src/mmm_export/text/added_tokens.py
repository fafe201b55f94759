"""The tokens that SentencePiece never sees: read from the JSON files beside tokenizer.model.

The order of authority is Hugging Face's: `added_tokens_decoder` of tokenizer_config.json alone when it is there;
otherwise added_tokens.json with the roles of special_tokens_map.json. Files that contradict each other are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.errors import TokenizerError
from mmm_export.text.piece_model import PieceModel

_EXTRA = "additional_special_tokens"
# In this order tokens without an id get one. The values are what InternLM2's tokenizer assumes where no file names
# the role.
_ROLES: dict[str, str | None] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": None,
    "pad_token": "</s>",
    "cls_token": None,
    "mask_token": None,
}


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before SentencePiece sees it.

    `lstrip` and `rstrip` make it swallow the white space on that side; `single_word` lets it match only beside a space.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class AddedTokens:
    """All added tokens by id, which of them have a special role, and the switches of tokenizer_config.json.

    `special` are left out by `decode(skip_special_tokens=True)`; `extra` are those of them that are named as additional
    special tokens.
    """

    by_id: dict[int, AddedToken]
    special: frozenset[str]
    extra: frozenset[str]
    roles: dict[str, str]
    add_bos: bool
    add_eos: bool
    clean_up_spaces: bool
    ids: dict[str, int] = field(default_factory=dict)  # content -> id


def read_added_tokens(folder: Path, model: PieceModel) -> AddedTokens:
    """Read the JSON files beside a tokenizer.model; any of them may be missing.

    Raises TokenizerError for malformed JSON, wrong types, two tokens with one id, and one token with two ids.
    """
    config_path = folder / names.TOKENIZER_CONFIG_FILE
    config = _read_object(config_path)
    added = _read_object(folder / names.ADDED_TOKENS_FILE)
    special = _read_object(folder / names.SPECIAL_TOKENS_FILE)

    table = _Table(model)
    for content, index in added.items():
        path = folder / names.ADDED_TOKENS_FILE
        table.add(path, _token_id(path, content, index), AddedToken(content))
    if "added_tokens_decoder" in config:
        decoder = _mapping(config_path, "added_tokens_decoder", config["added_tokens_decoder"])
        for key, value in decoder.items():
            token = _token(config_path, f"added_tokens_decoder[{key!r}]", value)
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise _wrong(config_path, "added_tokens_decoder", f"key {key!r}", "token ids as keys")
            table.add(config_path, int(key), token)
        sources = [(config_path, config)]
    else:
        sources = [(config_path, config), (folder / names.SPECIAL_TOKENS_FILE, special)]

    roles = _roles(sources)
    extra = _extra_tokens(sources)
    for name, (path, value) in roles.items():
        # A token that the table knows keeps the table's flags, unless it is an additional token with flags of its own.
        table.assign(_token(path, name, value), flags_win=False, path=path)
    for path, value in extra:
        table.assign(_token(path, _EXTRA, value), flags_win=isinstance(value, dict), path=path)
    role_names = {name: _token(path, name, value).content for name, (path, value) in roles.items()}
    extra_names = frozenset(_token(path, _EXTRA, value).content for path, value in extra)
    return AddedTokens(
        by_id=table.by_id,
        special=frozenset(role_names.values()) | extra_names,
        extra=extra_names,
        roles=role_names,
        add_bos=_flag(config_path, config, "add_bos_token", True),
        add_eos=_flag(config_path, config, "add_eos_token", False),
        clean_up_spaces=_flag(config_path, config, "clean_up_tokenization_spaces", False),
        ids=table.ids,
    )


class _Table:
    """Tokens by id while the files are read; every addition is checked against what is there."""

    def __init__(self, model: PieceModel) -> None:
        self.by_id: dict[int, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self._model = model
        self._pieces = {piece: i for i, piece in enumerate(model.pieces)}

    def add(self, path: Path, index: int, token: AddedToken) -> None:
        content = token.content
        other = self.by_id.get(index)
        if other is not None and other.content != content:
            raise TokenizerError(
                f"{path} gives one id to two tokens",
                found=f"id {index} for {content!r} and for {other.content!r}",
                wanted="one token for every id",
                hint="copy the tokenizer files from one checkpoint",
            )
        known = self.ids.get(content, self._pieces.get(content, index))
        if known != index:
            raise TokenizerError(
                f"{path} gives two ids to one token",
                found=f"ids {known} and {index} for {content!r}",
                wanted="one id for every token",
                hint="copy the tokenizer files from one checkpoint",
            )
        self.by_id[index] = token
        self.ids[content] = index

    def assign(self, token: AddedToken, *, flags_win: bool, path: Path) -> None:
        """Make a token with a role an added token: at its known id, or at the end of the vocabulary."""
        if token.content in self.ids:
            index = self.ids[token.content]
            if not flags_win:
                return
        elif token.content in self._pieces:
            index = self._pieces[token.content]
        else:
            # The count of distinct texts, as Hugging Face does it: an overridden piece no longer counts.
            texts = {t.content if (t := self.by_id.get(i)) else piece for piece, i in self._pieces.items()}
            index = len(texts | self.ids.keys())
        self.add(path, index, token)


def _roles(sources: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, tuple[Path, Any]]:
    """Name each role's token: by the last source that does, else InternLM2's default. A role set to null has none."""
    roles: dict[str, tuple[Path, Any]] = {}
    for name, default in _ROLES.items():
        path, value = sources[0][0], default
        for source, content in sources:
            if name in content:
                path, value = source, content[name]
        if value:
            roles[name] = (path, value)
    return roles


def _extra_tokens(sources: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, Any]]:
    extra: list[tuple[Path, Any]] = []
    for path, content in sources:
        values = content.get(_EXTRA) or []
        if not isinstance(values, list):
            raise _wrong(path, _EXTRA, type(values).__name__, "a list of tokens")
        extra.extend((path, value) for value in values)
    return extra


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where the file is missing."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise TokenizerError(
            f"{path} cannot be read",
            found=f"{type(error).__name__}: {error}",
            wanted="a JSON object",
            hint=f"copy {path.name} from the checkpoint again",
        ) from error
    return _mapping(path, "the file", data)


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, what, type(value).__name__, "a JSON object")
    return value


def _token(path: Path, what: str, value: Any) -> AddedToken:
    """Read a token as Hugging Face writes it: a plain string, or an object with `content` and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise _wrong(path, what, f"{value!r:.80}", "a token: text, or an object with its text as content")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _wrong(path, what, ascii(content), "valid Unicode text") from error
    if isinstance(value, str):
        return AddedToken(content)
    return AddedToken(content, *(_flag(path, value, name, False) for name in ("lstrip", "rstrip", "single_word")))


def _token_id(path: Path, content: str, index: Any) -> int:
    _token(path, "a token", content)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 1 << 31:
        raise _wrong(path, repr(content), repr(index), "a token id, a number from 0 on")
    return index


def _flag(path: Path, content: Mapping[str, Any], name: str, default: bool) -> bool:
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(path, name, repr(value), "true or false")
    return value


def _wrong(path: Path, what: str, found: str, wanted: str) -> TokenizerError:
    return TokenizerError(f"{path}: {what} is of the wrong kind", found=found, wanted=wanted)
