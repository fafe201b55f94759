"""From a YAML file to a Recipe: every key and value is checked, a misspelt key is answered with the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmm_export.distillation.recipe import Recipe
from mmm_export.distillation.stage import OBJECTIVES, StageOptions
from mmm_export.errors import MmmError, OptionError

FOLDER = Path(__file__).parent / "recipes"
LARGEST_BYTES = 1 << 20


class RecipeError(MmmError):
    """A recipe cannot be used."""


def shipped_recipes() -> tuple[str, ...]:
    """Name the recipes that come with the program."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def recipe_path(name: str) -> Path:
    """Find a recipe by its path or, for one that comes with the program, by its name.

    Raises:
        RecipeError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped_recipes():
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, shipped_recipes(), n=1)
    raise RecipeError(
        f"there is no recipe {name}",
        found="a folder" if path.is_dir() else "no such file",
        wanted=f"a YAML file, or one of {', '.join(shipped_recipes())}",
        hint=f"did you mean {near[0]}?" if near else None,
    )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or has a key or a value that does not fit.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise RecipeError(f"{path} is no recipe", found=f"{path.stat().st_size} bytes", wanted="a short YAML file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read", found=str(error)[:100], wanted="a YAML file in UTF-8") from error
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError, ArithmeticError) as error:
        where = ""
        if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
            where = f" at line {error.problem_mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise RecipeError(f"{path} is no YAML", found=f"{str(problem).splitlines()[0][:120]}{where}") from error
    return recipe_from_mapping(data, str(path))


def recipe_from_mapping(data: object, name: str) -> Recipe:
    """Check plain data, as YAML gives it, and make a Recipe of it.

    Args:
        data: the content.
        name: of the file, for messages.

    Raises:
        RecipeError: a key or a value does not fit.
    """
    top = _mapping(data, name, "the recipe")
    _refuse_unknown(top, [field.name for field in dataclasses.fields(Recipe)], name, "")
    stages = _mapping(top.get("stages"), name, "stages")
    _refuse_unknown(stages, list(OBJECTIVES), name, "stages.")
    values: dict[str, Any] = {
        "stages": {key: _options(StageOptions, value, name, f"stages.{key}") for key, value in stages.items()}
    }
    hints = get_type_hints(Recipe)
    for key, value in top.items():
        if key == "stages":
            continue
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _options(hints[key], value, name, key)
        else:
            values[key] = _value(value, hints[key], name, key)
    recipe: Recipe = _made(Recipe, values, name)
    return recipe


def _options(kind: Any, data: object, name: str, where: str) -> Any:
    given = _mapping(data, name, where)
    hints = get_type_hints(kind)
    _refuse_unknown(given, list(hints), name, f"{where}.")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    for key in required:
        if key not in given:
            raise RecipeError(f"{name} lacks {where}.{key}", hint=f"add {key}: to {where}")
    return _made(kind, {key: _value(v, hints[key], name, f"{where}.{key}") for key, v in given.items()}, name)


def _made(kind: Any, values: dict[str, Any], name: str) -> Any:
    try:
        return kind(**values)
    except OptionError as error:
        raise RecipeError(f"{name}: {error.what}", found=error.found, wanted=error.wanted, hint=error.hint) from error


def _mapping(data: object, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else type(data).__name__
        raise RecipeError(f"{name}: {where} holds no keys", found=found, wanted="lines such as key: value")
    for key in data:
        if not isinstance(key, str):
            raise RecipeError(f"{name}: a key of {where} is no word", found=f"{key!r:.60}")
    return data


def _refuse_unknown(given: Mapping[str, Any], known: list[str], name: str, where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"{name} has an unknown key {where}{key!r:.60}",
                wanted=", ".join(known),
                hint=f"did you mean {near[0]!r}?" if near else None,
            )


def _value(value: object, hint: Any, name: str, where: str) -> Any:
    """Check a value against the type of its field; a whole number will do for a float, nothing else is converted."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(value, next(a for a in arguments if a is not type(None)), name, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise _wrong(name, where, value, " or ".join(map(str, arguments)), arguments)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(name, where, value, "a list such as [a, b]")
        return tuple(_value(item, arguments[0], name, where) for item in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(_bounded(value)):
            raise _wrong(name, where, value, "a number")
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", bool: "true or false", str: "text"}
        raise _wrong(name, where, value, words[hint])
    return value


def _bounded(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wrong(name: str, where: str, value: object, wanted: str, choices: tuple[Any, ...] = ()) -> RecipeError:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return RecipeError(
        f"{name}: {where} has a value that it cannot have",
        found=f"{value!r:.60}",
        wanted=wanted,
        hint=f"did you mean {near[0]}?" if near else None,
    )
