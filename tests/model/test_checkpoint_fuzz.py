"""Whatever is in config.json or in a safetensors header: only an MmmError may come out of opening a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from mmm_export.errors import MmmError
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec, write_checkpoint

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.integers(-3, 100) | st.integers() | st.floats()
values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=8)
    | st.sampled_from(["mamba2", "mha", "pre", "F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), tiny_spec(kinds="hybrid"), tokenizer=False)


@pytest.fixture
def changed(tmp_path: Path, whole: Path) -> Callable[..., None]:
    """Open the checkpoint with one file replaced; anything but an MmmError is a failure."""
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def open_changed(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(MmmError):
            Checkpoint.open(tmp_path, rope_scaling="teacher")

    return open_changed


def paths_of(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    return [path] * bool(path) + [found for key, value in items for found in paths_of(value, (*path, key))]


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(data)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_config_json(changed: Callable[..., None], whole: Path, data: st.DataObject) -> None:
    config = json.loads((whole / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(config)))
        config = replaced(config, path, data.draw(values))
    changed("config.json", json.dumps(config).encode())


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_a_header(changed: Callable[..., None], whole: Path, data: st.DataObject) -> None:
    content = (whole / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    path = data.draw(st.sampled_from(paths_of(header)))
    header = json.dumps(replaced(header, path, data.draw(values))).encode()
    changed("model.safetensors", struct.pack("<Q", len(header)) + header + content[end:])


@FUZZ
@given(data=st.data())
def test_any_byte_anywhere_before_the_weights(changed: Callable[..., None], whole: Path, data: st.DataObject) -> None:
    content = bytearray((whole / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    changed("model.safetensors", bytes(content))


@FUZZ
@given(content=st.binary(max_size=200), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_any_bytes_at_all(changed: Callable[..., None], content: bytes, name: str) -> None:
    changed(name, content)
