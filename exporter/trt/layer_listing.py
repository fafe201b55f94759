"""The layers of a plan by profile, read from what the builder logs (TensorRT-RTX) or the inspector says (TensorRT)."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

# One row: {"kind", "name", "inputs", "outputs"}, tensors as "name:Type[dims]".
Row = dict[str, Any]

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[.*?\])?, "
    r"Outputs: \[(?P<outputs>.*?)\](?:, TacticName: |$)"
)
_TENSOR = re.compile(r"Name: (?P<name>[^,]+),.*?Dimensions: \[(?P<dims>[^]]*)\].*?Datatype: (?P<dtype>\w+)")
_PROFILE = re.compile(r" \[profile (\d+)\]")
STORED = "stored"  # a listing in the form of layers.json
PLUGIN_KINDS = ("custom_layer", "PluginV3", "PluginV2")


def layers_by_profile(form: str, text: str) -> dict[int, list[Row]]:
    """Return the rows of each profile. A line of an unknown form becomes a row of kind "unknown", so that nothing is lost."""
    if form == STORED:
        return dict(enumerate(json.loads(text)["profiles"].values()))
    return _from_log(text) if form == "log" else _from_inspector(text) if form == "inspector" else {}


def listing_form(form: str, text: str) -> str:
    """Say where a listing came from, "log" or "inspector", also of one that was stored."""
    return str(json.loads(text)["form"]) if form == STORED else form


def _from_log(text: str) -> dict[int, list[Row]]:
    part = text.partition("Layers:\n")[2].partition("I/O Tensors:")[0]
    found: dict[int, list[Row]] = {}
    profile = 0
    for line in (line.strip() for line in part.splitlines()):
        if not line:
            continue
        # Listed profile after profile; only layers that touch a named tensor say which.
        mark = _PROFILE.search(line)
        profile = int(mark[1]) if mark else profile
        match = _LAYER.match(line)
        row: Row = {"kind": "unknown", "name": line[:200], "inputs": [], "outputs": []}
        if match:
            row = {
                "kind": match["kind"],
                "name": _PROFILE.sub("", match["name"]),
                "inputs": _tensors(match["inputs"]),
                "outputs": _tensors(match["outputs"]),
            }
        found.setdefault(profile, []).append(row)
    return found


def _tensors(text: str) -> list[str]:
    return [f"{_PROFILE.sub('', m['name'])}:{m['dtype']}[{m['dims']}]" for m in _TENSOR.finditer(text)]


def _from_inspector(text: str) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    for layer in _items(data, "Layers"):
        # Without details a layer is its name.
        facts = layer if isinstance(layer, dict) else {"Name": layer}
        name = str(facts.get("Name", ""))
        mark = _PROFILE.search(name)
        row = {
            "kind": str(facts.get("LayerType", "unknown")),
            "name": _PROFILE.sub("", name),
            "inputs": [_described(tensor) for tensor in _items(facts, "Inputs")],
            "outputs": [_described(tensor) for tensor in _items(facts, "Outputs")],
        }
        found.setdefault(int(mark[1]) if mark else 0, []).append(row)
    return found


def _items(owner: object, key: str) -> list[Any]:
    """Return a list that `owner` holds under `key`; empty for anything else, since the form changes from version to version."""
    value = owner.get(key) if isinstance(owner, dict) else None
    return value if isinstance(value, list) else []


def _described(tensor: object) -> str:
    if not isinstance(tensor, dict):
        return str(tensor)
    kind = tensor.get("Datatype") or tensor.get("Format/Datatype") or "?"
    dims = ",".join(map(str, _items(tensor, "Dimensions")))
    return f"{_PROFILE.sub('', str(tensor.get('Name')))}:{kind}[{dims}]"


def summary(rows: list[Row]) -> dict[str, int]:
    """Count layers by kind, most frequent first; "copies" are those that only move or reformat."""
    kinds = Counter(row["kind"] for row in rows)
    copies = sum(is_copy(row) for row in rows)
    return {"layers": len(rows), **dict(kinds.most_common()), "copies": copies}


def is_copy(row: Row) -> bool:
    """Whether a layer only copies or reformats, by its kind and name."""
    name = re.sub(r"_myl\d+_\d+$|__mye\d+|__myl_|_?\d+", "", row["name"])
    return row["kind"].lower() in ("reformat", "copy", "nooperation") or name in ("Resh", "Move", "Copy", "Tran")
