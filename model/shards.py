"""Which safetensors files of a folder hold the weights, and which tensor is in which."""

from __future__ import annotations

import reprlib
from pathlib import Path

from mmm_export.errors import CheckpointError
from mmm_export.model.config import read_json_object
from mmm_export.model.stored import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...], list[str]]:
    """Read the headers of all weight files of a checkpoint.

    Returns:
        every tensor by name; the files in order; findings: sentences about what is odd but usable.

    Raises:
        CheckpointError: no weights, a shard missing or damaged, index and shards disagree, a tensor stored twice.
    """
    index = _weight_map(folder)
    findings: list[str] = []
    single = folder / SINGLE_FILE
    if index is not None and single.is_file() and SINGLE_FILE not in index.values():
        findings.append(f"{SINGLE_FILE} and {INDEX_FILE} are both present; {SINGLE_FILE} is read, the shards are not")
        index = None
    if index is not None:
        files = tuple(folder / name for name in sorted(set(index.values())))
    elif single.is_file():
        files = (single,)
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
        if not files:
            raise _no_weights(folder)
        findings.append(f"no {INDEX_FILE}; every safetensors file of the folder is read ({len(files)})")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{folder} lacks a shard",
                found=f"no file {file.name}",
                wanted=f"every file that {INDEX_FILE} names",
                hint="copy or download the checkpoint again",
            )
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"tensor {name} is stored twice",
                    found=f"in {stored[name].file.name} and in {file.name}",
                    wanted="each tensor in one file",
                    hint="remove the files of another checkpoint from the folder",
                )
            stored[name] = tensor
    if index is not None:
        findings.extend(_compare(index, stored))
    return stored, files, findings


def _compare(index: dict[str, str], stored: dict[str, StoredTensor]) -> list[str]:
    """Compare index and shards; returns findings."""
    for name, file in index.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(
                f"{INDEX_FILE} and the shards disagree about tensor {name!r:.120}",
                found=f"it is in {stored[name].file.name}" if name in stored else f"it is not in {file}",
                wanted=f"in {file}",
                hint="copy or download the checkpoint again",
            )
    unlisted = sorted(stored.keys() - index.keys())
    return [f"{len(unlisted)} tensors are in the shards but not in {INDEX_FILE}: {unlisted[0]} ..."] if unlisted else []


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Read the index: file name by tensor name; None when there is none."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} is no index",
            found=f"weight_map is {reprlib.repr(weight_map)}",
            wanted="a file name for each tensor",
        )
    for name, file in weight_map.items():
        # A name that leads out of the folder would read files that are no part of the checkpoint.
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise CheckpointError(
                f"{path} names an unusable file for tensor {name!r:.80}",
                found=reprlib.repr(file),
                wanted="the name of a file in the same folder",
            )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = None
    if other:
        hint = "convert it: load it with transformers and save_pretrained(FOLDER, safe_serialization=True)"
    return CheckpointError(
        f"{folder} has no weights in safetensors format",
        found=f"only {other[0]}" if other else "no *.safetensors file",
        wanted=f"{SINGLE_FILE}, or shards and {INDEX_FILE}",
        hint=hint,
    )
