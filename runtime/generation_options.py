"""How an answer is sampled and when it ends."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmm_export.errors import OptionError


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is sampled and when it ends. The defaults are greedy.

    Logits pass, in this order: repetition penalty, temperature, top-k, top-p, min-p, then one token is drawn. With
    temperature 0, or top_k 1, the largest logit after the penalty wins, the lowest id among equals.

    Attributes:
        max_new_tokens: at most so many tokens, at least 1.
        temperature: logits are divided by it; 0 is greedy, 1 leaves them.
        top_k: only the k largest logits stay; 0 keeps all.
        top_p: only the smallest set of likeliest tokens stays whose probabilities reach p, in (0, 1]; 1 keeps all.
        min_p: only tokens at least min_p times as likely as the likeliest stay, in [0, 1]; 0 keeps all.
        repetition_penalty: positive logits of tokens that are already in the context are divided by it, negative ones
            multiplied; 1 leaves them.
        seed: makes the draws repeatable; None draws anew each time.
        stop: strings that end the answer; neither they nor anything after them is in its text.
        stop_ids: token ids that end it; None for the model's own (`<|im_end|>` and end of text).

    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_number("temperature", self.temperature, lambda x: x >= 0, "0 (greedy) or more")
        _check_integer("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "more than 0, at most 1")
        _check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "0 to 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "more than 0; 1 is none")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _stop_ids(self.stop_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Options from names and values. Raises OptionError for an unknown name, with the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise OptionError(
                    f"no generation option {name!r}",
                    wanted=", ".join(known),
                    hint=f"did you mean {near[0]!r}?" if near else None,
                )
        return cls(**values)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise OptionError(f"{name} is out of range", found=repr(value), wanted=f"an integer of at least {least}")


def _check_number(name: str, value: Any, is_allowed: Any, wanted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not is_allowed(value):
        raise OptionError(f"{name} is out of range", found=repr(value), wanted=wanted)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(string, str) and string for string in strings):
        raise OptionError("stop is not usable", found=repr(value), wanted="strings of at least one character")
    return strings


def _stop_ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value)
    for token in ids:
        _check_integer("stop_ids", token, 0)
    return tuple(int(token) for token in ids)
