"""The folder in which a distillation keeps what it needs to go on: the recipe, the log, snapshots, results of stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmm_export.distillation.batch import Batch
from mmm_export.distillation.recipe import Recipe
from mmm_export.distillation.stage import STAGES, StageName
from mmm_export.distillation.trainer import Record
from mmm_export.errors import MmmError, OutputError
from mmm_export.output import output_file

SNAPSHOT = "snapshot.pt"
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
BAD_BATCH = "bad-batch.pt"


class SnapshotError(MmmError):
    """A stored state of a training cannot be used."""


class WorkFolder:
    """Work of one distillation.

    Args:
        folder: where; made when needed.
        identity: what the work depends on; a folder of another identity is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    @property
    def log(self) -> Path:
        """One JSON object for each step."""
        return self.folder / LOG_FILE

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or check that the one that is there can be gone on with.

        Raises:
            OutputError: it holds work and `resume` is off.
            SnapshotError: its work is of another recipe, teacher or data.
        """
        run = self.folder / RUN_FILE
        if run.is_file():
            if not resume:
                raise OutputError(
                    f"{self.folder} holds the work of an earlier run",
                    hint="go on with --resume, or remove the folder",
                )
            try:
                found = json.loads(run.read_text(encoding="utf-8"))["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise SnapshotError(f"{run} is damaged", found=str(error), hint="remove the folder") from error
            if found != self.identity:
                raise SnapshotError(
                    f"{self.folder} holds the work of another run",
                    found=f"identity {str(found)[:16]}",
                    wanted=f"identity {self.identity[:16]}: the same recipe, teacher and data",
                    hint="undo the change, or remove the folder to begin anew",
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with output_file(run) as path:
            path.write_text(json.dumps({"identity": self.identity}) + "\n", encoding="utf-8")

    def save_snapshot(self, state: dict[str, Any]) -> None:
        """Store the state of a stage; it replaces the one before at once."""
        self._save(SNAPSHOT, state)

    def snapshot(self) -> dict[str, Any] | None:
        """Read the newest state, None where there is none."""
        state: dict[str, Any] | None = self._load(SNAPSHOT)
        return state

    def save_result(self, name: StageName, parameters: dict[str, Tensor]) -> None:
        """Store what a finished stage made of the parameters that it trained."""
        self._save(f"{name}.pt", parameters)

    def result(self, name: StageName) -> dict[str, Tensor] | None:
        """Read what a finished stage made, None where it is not finished."""
        parameters: dict[str, Tensor] | None = self._load(f"{name}.pt")
        return parameters

    def newest_before(self, name: StageName) -> StageName | None:
        """Name the newest finished stage in front of another."""
        earlier = STAGES[: STAGES.index(name)] if name in STAGES else ()
        return next((s for s in reversed(earlier) if (self.folder / f"{s}.pt").is_file()), None)

    def save_bad_batch(self, batches: list[Batch], indices: list[int], rank: int) -> Path:
        """Store the batches of a step whose loss was no number, and which samples they were made of."""
        name = BAD_BATCH if rank == 0 else f"bad-batch-{rank}.pt"
        self._save(name, {"indices": indices, "batches": [batch.to("cpu").tensors() for batch in batches]})
        return self.folder / name

    @contextmanager
    def records(self, stage: StageName, step: int) -> Iterator[Any]:
        """Yield a function that adds a record to the log; lines of `stage` beyond `step` are removed first."""
        kept = []
        if self.log.is_file():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    if record["stage"] != stage or record["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # the end of a line that a kill cut off
        with output_file(self.log) as path:
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        with self.log.open("a", encoding="utf-8") as stream:

            def write(record: Record) -> None:
                stream.write(json.dumps(record) + "\n")
                stream.flush()

            yield write

    def _save(self, name: str, value: object) -> None:
        with output_file(self.folder / name) as path:
            torch.save(value, path)

    def _load(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file ends in any of a dozen exception types
            raise SnapshotError(
                f"{path} cannot be read",
                found=f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}",
                wanted="a file that this program wrote",
                hint=f"remove it{' to begin the stage anew' if name == SNAPSHOT else ''}",
            ) from error


def work_identity(recipe: Recipe, teacher: str, data: str) -> str:
    """Name what a run computes by a hash: of the recipe (but how it is run), the teacher and the data."""
    stages = [(name, replace(stage, samples_per_pass=1)) for name, stage in recipe.stages.items()]
    parts = [recipe.seed, recipe.seeding, recipe.layout, recipe.data.max_tokens, recipe.data.max_tiles]
    parts += [recipe.data.packing, recipe.data.system, recipe.run.dtype, stages, teacher, data]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_identity(path: Path) -> str:
    """Tell a file from others by its name, size and time: hashing the images of a large data set would take hours."""
    status = path.stat()
    return f"{path.name}/{status.st_size}/{status.st_mtime_ns}"
