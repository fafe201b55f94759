"""Plans that were finished before a build ended early: kept beside the folder until it is whole, taken again if nothing changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.engine_manifest import read_engine_manifest
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.builder import Built
from mmm_export.exporter.trt.layer_listing import STORED
from mmm_export.manifest import FileInfo, file_info


class FinishedPlans:
    """Plans for one output folder.

    A finished plan lies in `.NAME.finished/` beside the output, linked and not copied, with a note that holds its key and hash. The
    note is written last, so a plan without one is none.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.finished"

    def take(self, name: str, key: str, into: Path) -> Built | None:
        """Link or copy the plan of this key to `into`/`name`; None where there is none, or it is damaged."""
        note = self._note(name)
        if note is not None and note["key"] == key:
            info = FileInfo(**note["file"])
            if self._is_whole(self.folder / name, info):
                _link(self.folder / name, into / name)
                fields = note["built"]
                listings = tuple((form, text) for form, text in fields.pop("listings"))
                return Built(**fields, listings=listings)
        return self._from_output(name, key, into)

    def keep(self, name: str, key: str, made_in: Path, built: Built) -> None:
        """Keep a plan that was just built. Where links are not possible nothing is kept: a copy would need the space twice."""
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            for old in (self.folder / name, self._note_file(name)):
                old.unlink(missing_ok=True)
            os.link(made_in / name, self.folder / name)
            info = dataclasses.asdict(file_info(made_in / name))
            data = {"key": key, "file": info, "built": dataclasses.asdict(built)}
            partial = self.folder / f"{name}.partial"
            partial.write_text(json.dumps(data), encoding="utf-8")
            partial.replace(self._note_file(name))

    def remove(self) -> None:
        """Forget all: the folder is whole now."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _from_output(self, name: str, key: str, into: Path) -> Built | None:
        """Take the plan from the engine folder that is about to be replaced."""
        try:
            manifest = read_engine_manifest(self.output)
            plan, info = manifest.plans[name], manifest.files[name]
            listing = json.loads((self.output / names.LAYERS_FILE).read_text(encoding="utf-8"))[name]
            if plan.key != key or not self._is_whole(self.output / name, info):
                return None
            _link(self.output / name, into / name)
        except (EngineError, OSError, ValueError, KeyError, TypeError):
            return None
        return Built(info.bytes, plan.build_seconds, plan.peak_bytes, ((STORED, json.dumps(listing)),))

    def _note_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _note(self, name: str) -> dict[str, Any] | None:
        try:
            data = json.loads(self._note_file(name).read_text(encoding="utf-8"))
            return data if isinstance(data, dict) and {"key", "file", "built"} <= set(data) else None
        except (OSError, ValueError):
            return None

    @staticmethod
    def _is_whole(path: Path, info: FileInfo) -> bool:
        try:
            return file_info(path) == info
        except OSError:
            return False


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
