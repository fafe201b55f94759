"""What a Python binding really offers; a script for a Python that has it.

Arguments: the module, and JSON {class: [attribute, ...]}, "" for the module itself. Prints JSON of the same form: for each attribute
null if it is missing, else {"kind": "method" | "value", "signatures": [[[parameter, has a default], ...], ...]}.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from typing import Any


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    wanted: dict[str, list[str]] = json.loads(sys.argv[2])
    told = {}
    for owner, attributes in wanted.items():
        holder = module
        for part in filter(None, owner.split(".")):
            holder = getattr(holder, part, None)
        told[owner] = {name: _told(holder, name) for name in attributes}
    print(json.dumps(told))


def _told(holder: Any, name: str) -> Any:
    if not hasattr(holder, name):
        return None
    value = getattr(holder, name)
    if not callable(value) or isinstance(value, type):
        return {"kind": "value", "signatures": []}
    try:
        parameters = inspect.signature(value).parameters.values()
        return {"kind": "method", "signatures": [[[p.name, p.default is not p.empty] for p in parameters]]}
    except (TypeError, ValueError):
        return {"kind": "method", "signatures": _from_text(name, value.__doc__ or "")}


def _from_text(name: str, text: str) -> list[list[list[Any]]]:
    """Read the signatures that pybind11 writes at the beginning of each overload's text."""
    rows = []
    for inside in re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) ->", text, re.MULTILINE):
        parts = [part.split(":")[0].strip() for part in _split(inside)]
        defaults = ["=" in part for part in _split(inside)]
        rows.append([[part, has] for part, has in zip(parts, defaults, strict=True) if part != "self"])
    return rows


def _split(inside: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in inside:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part for part in [*parts, current] if part.strip()]


if __name__ == "__main__":
    main()
