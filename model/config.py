"""config.json of a checkpoint: read once, each value checked for its type where it is asked for."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.errors import CheckpointError

MOST = 2**31 - 1  # no size of a model comes near; keeps later arithmetic and loops sane


class Section:
    """An object of config.json. An absent or null value is None; one of the wrong type is a CheckpointError.

    Args:
        data: the object.
        file: where it was read, for messages.
        path: keys from the top to this object, with a dot after each.
    """

    def __init__(self, data: dict[str, Any], file: Path, path: str = "") -> None:
        self.data = data
        self.file = file
        self.path = path

    def where(self, key: str) -> str:
        """Name a value in messages: `config.json: llm_config.hidden_size`."""
        return f"{self.file.name}: {self.path}{key}"

    def integer(self, key: str, *, least: int = 1) -> int | None:
        """Give a whole number from `least` to 2**31 - 1."""
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str) -> float | None:
        """Give a positive finite number."""
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e300:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """Give true or false."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Give a string."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Give a list of strings; a plain string is a list of one."""
        value = self.data.get(key)
        if value is None:
            return None
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.wrong(key, "a list of strings")
        return tuple(items)

    def section(self, key: str) -> Section | None:
        """Give a nested object."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Section(value, self.file, f"{self.path}{key}.")

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """Build the error for a value that is not what it should be."""
        return CheckpointError(
            f"{self.where(key)} has an unusable value",
            found=reprlib.repr(self.data.get(key)),
            wanted=wanted,
            hint=f"the file is {self.file}",
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read", found=error.strerror or type(error).__name__, wanted="a readable file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON",
            found=f"{type(error).__name__}: {error}",
            wanted="one JSON object",
            hint="copy or download the file again",
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object", found=type(data).__name__, wanted="an object { ... }")
    return data


def read_config(folder: Path) -> Section:
    """Read config.json of a checkpoint folder; both parts of the model are then known to be described.

    Raises:
        CheckpointError: no such folder or file, not JSON, or of another kind of model.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a checkpoint folder",
            found="a file" if folder.exists() else "nothing at this path",
            wanted=f"a folder with {names.CONFIG_FILE} and safetensors files",
        )
    path = folder / names.CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint folder",
            found=f"no {names.CONFIG_FILE} in it",
            wanted=f"a folder with {names.CONFIG_FILE} and safetensors files",
        )
    config = Section(read_json_object(path), path)
    missing = [part for part in ("embedding_config", "llm_config") if config.section(part) is None]
    if missing:
        raise CheckpointError(
            f"{path} does not describe an mmMamba model",
            found=f"no {' and no '.join(missing)}; model_type {reprlib.repr(config.data.get('model_type'))}",
            wanted="embedding_config and llm_config, as in hustvl/mmMamba-linear",
        )
    return config
