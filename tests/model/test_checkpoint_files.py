"""Weight files and tokenizers that cannot be used: truncated, damaged, missing, stored twice, of another model."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec, write_checkpoint


def error_of(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return caught.value


def written(folder: Path, **options: Any) -> Path:
    return write_checkpoint(folder, tiny_spec(), tokenizer=False, **options)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (written(tmp_path) / "model.safetensors").unlink()
    assert "no weights in safetensors format" in error_of(tmp_path).what
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    error = error_of(tmp_path)
    assert error.found == "only pytorch_model.bin"
    assert "safe_serialization" in str(error.hint)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (written(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    assert error_of(tmp_path).found == "no file model-00002-of-00003.safetensors"


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "absent": "model-00001-of-00002.safetensors"}}))
    assert "'absent'" in error_of(tmp_path).what
    other = dict.fromkeys(index["weight_map"], "model-00002-of-00002.safetensors")
    path.write_text(json.dumps({"weight_map": {**other, tensors.HEAD: "model-00001-of-00002.safetensors"}}))
    assert "disagree about tensor" in error_of(tmp_path).what


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    written(tmp_path, shards=2)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00003.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    error = error_of(tmp_path)
    assert "is stored twice" in error.what
    assert error.found == "in model-00001-of-00002.safetensors and in model-00003.safetensors"


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", "a\0b", "\ud800", 5, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, file: Any) -> None:
    path = written(tmp_path, shards=2) / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    assert "index.json" in str(error_of(tmp_path))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (written(tmp_path, shards=2) / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in error_of(tmp_path).what


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 7, 8, 100, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        error = error_of(tmp_path)
        assert f"{path} is truncated" in error.what
        assert error.found == f"{length} bytes"
    path.write_bytes(whole + b"\0")
    assert error_of(tmp_path).found == "1 bytes behind the last tensor"


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"nonsense",
        b"[]",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        json.dumps({"a": ENTRY | {"shape": [3]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [-2]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [2.0]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [float("nan")]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [1] * 9 + [2]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": 2}}).encode(),
        json.dumps({"a": ENTRY | {"data_offsets": [8, 0]}}).encode(),
        json.dumps({"a": ENTRY | {"data_offsets": [0, 8, 8]}}).encode(),
        json.dumps({"a": ENTRY, "b": ENTRY}).encode(),
        json.dumps({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}).encode(),
        json.dumps({"\ud800": ENTRY}).encode(),
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = written(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert error_of(tmp_path).what == f"{path} is damaged"


def test_an_unknown_number_format_is_named(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    header = json.dumps({"a": ENTRY | {"dtype": "F7"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert error_of(tmp_path).found == "'F7'"


def test_a_file_that_changes_after_opening_is_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(written(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="as it was when the checkpoint was opened"):
        checkpoint.tensor(tensors.HEAD)
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        checkpoint.tensor("nothing")


# Tokenizer.


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "large", tiny_spec(vocab_size=520))
    folder = write_checkpoint(tmp_path / "small", tiny_spec())
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(tmp_path / "large" / name, folder / name)
    error = error_of(folder)
    assert "tokenizer" in error.what
    assert (error.found, error.wanted[:8]) == ("token ids up to 519", "0 to 511")


def test_another_image_token_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_spec(image_token_id=100))
    error = error_of(folder)
    assert (error.found, error.wanted[:6]) == ("<IMG_CONTEXT> is id 505", "id 100")


def test_a_missing_tokenizer_is_no_error_but_a_finding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_spec())
    (folder / "tokenizer.model").unlink()
    assert any("no tokenizer.model" in finding for finding in Checkpoint.open(folder).findings)
