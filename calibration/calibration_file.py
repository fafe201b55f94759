"""calibration.json and the samples beside it: what was measured, independent of format and consumer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmm_export import names
from mmm_export.calibration.ranges import METHODS, clip_from_histogram
from mmm_export.calibration.rounding import INT8
from mmm_export.calibration.statistics import PHASES, Histogram, Statistics
from mmm_export.errors import CalibrationError
from mmm_export.manifest import file_info

SCHEMA = 1
KIND = "calibration"
GROWTH = 1.05  # a range that the second half of the samples widened by more is not stable yet

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorRange:
    """Magnitudes of one activation.

    `name` is the graph's, `linears` read it. `largest` over all tokens, by phase, and in the first half of the samples; `clips`:
    where each method would saturate an int8 quantizer.
    """

    name: str
    linears: tuple[str, ...]
    channels: int
    largest: float
    first_half: float
    phases: dict[str, float]
    clips: dict[str, float]

    @property
    def is_stable(self) -> bool:
        return self.largest <= GROWTH * self.first_half


@dataclass(frozen=True)
class Calibration:
    """Content of calibration.json."""

    bundle_sha256: str  # Manifest.model_sha256 of the bundle that was run
    data_sha256: str
    samples: int
    tokens: dict[str, int]
    chunk_tokens: int
    samples_sha256: str  # of samples.safetensors
    tensors: tuple[TensorRange, ...]

    @property
    def unstable(self) -> tuple[TensorRange, ...]:
        """Ranges that still grew in the second half of the samples."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_stable)


@dataclass(frozen=True)
class Observed:
    """What the samples file holds of one activation: see `Statistics`. `rows` is float32."""

    maxima: Array
    mean_square: Array
    histogram: Histogram
    rows: Array


def range_from_statistics(name: str, linears: tuple[str, ...], seen: Statistics) -> TensorRange:
    clips: dict[str, float] = {m: float(clip_from_histogram(seen.histogram, seen.largest, m, INT8)) for m in METHODS}
    return TensorRange(name, linears, seen.channels, seen.largest, seen.first_half, dict(seen.phases), clips)


def arrays_from_statistics(name: str, seen: Statistics) -> dict[str, Array]:
    """What goes into the samples file, by key. Rows are float16 in units of the largest magnitude, so that they always fit."""
    rows = np.concatenate(seen.rows) if seen.rows else np.zeros((0, seen.channels), np.float32)
    unit = max(seen.largest, 1e-30)
    return {
        f"{name}/maxima": seen.maxima,
        f"{name}/mean_square": (seen.squares / max(seen.count, 1)).astype(np.float32),
        f"{name}/histogram": seen.histogram.counts,
        f"{name}/width": np.array([seen.histogram.width]),
        f"{name}/rows": (rows / unit).astype(np.float16),
    }


def write_calibration(
    folder: Path, arrays: Mapping[str, Array], tensors: tuple[TensorRange, ...], **fields: Any
) -> Calibration:
    """Write both files into `folder`; `fields` are the other fields of Calibration."""
    save_file(dict(arrays), folder / names.SAMPLES_FILE)
    calibration = Calibration(tensors=tensors, samples_sha256=file_info(folder / names.SAMPLES_FILE).sha256, **fields)
    data = {"schema": SCHEMA, "kind": KIND, **asdict(calibration)}
    (folder / names.CALIBRATION_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return calibration


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration.json. Raises CalibrationError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or (data.get("schema"), data.get("kind")) != (SCHEMA, KIND):
            raise ValueError(f"not schema {SCHEMA} of kind {KIND!r}")
        return _calibration(data)
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read", found=error.strerror, wanted=f"a {names.CALIBRATION_FILE} of mmm-export calibrate"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CalibrationError(
            f"{path} is no calibration, or a damaged one",
            found=f"{type(error).__name__}: {error}"[:200],
            wanted=f"{names.CALIBRATION_FILE} as mmm-export calibrate writes it",
            hint="calibrate again with --data",
        ) from error


class Samples:
    """The samples file of a calibration, read tensor by tensor."""

    def __init__(self, folder: Path, calibration: Calibration) -> None:
        """Open it. Raises CalibrationError: it is missing, damaged, or of another calibration."""
        path = folder / names.SAMPLES_FILE
        hint = "--from takes the calibration.json that lies beside its samples, in the folder BUNDLE.calibration"
        if not path.is_file():
            raise CalibrationError(f"the samples of the calibration are missing: {path}", hint=hint)
        if file_info(path).sha256 != calibration.samples_sha256:
            raise CalibrationError(
                f"{path} belongs to another calibration",
                wanted=f"sha256 {calibration.samples_sha256[:16]}",
                hint="calibrate again with --data",
            )
        self._ranges = {tensor.name: tensor for tensor in calibration.tensors}
        try:
            self._file = safe_open(path, framework="numpy")
            self._keys = set(self._file.keys())  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"{path} cannot be read", found=str(error)[:200]) from error

    def of(self, name: str) -> Observed:
        """Raises CalibrationError: nothing was measured of that activation."""
        if f"{name}/rows" not in self._keys or name not in self._ranges:
            raise CalibrationError(f"the calibration says nothing about {name}", hint="calibrate again with --data")

        def get(key: str) -> Array:
            array: Array = self._file.get_tensor(f"{name}/{key}")  # type: ignore[no-untyped-call]
            return array

        rows = get("rows").astype(np.float32) * np.float32(self._ranges[name].largest)
        return Observed(get("maxima"), get("mean_square"), Histogram(get("histogram"), float(get("width")[0])), rows)


def _calibration(data: dict[str, Any]) -> Calibration:
    tensors = tuple(_tensor(row) for row in _list(data["tensors"]))
    if not tensors:
        raise ValueError("no tensors")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("a tensor is listed twice")
    return Calibration(
        bundle_sha256=_text(data["bundle_sha256"]),
        data_sha256=_text(data["data_sha256"]),
        samples=_count(data["samples"], 1),
        tokens={phase: _count(data["tokens"][phase], 0) for phase in PHASES},
        chunk_tokens=_count(data["chunk_tokens"], 1),
        samples_sha256=_text(data["samples_sha256"]),
        tensors=tensors,
    )


def _tensor(row: Any) -> TensorRange:
    largest = _magnitude(row["largest"])
    if largest == 0.0:
        raise ValueError(f"{row['name']!r:.60} is always 0")
    clips: dict[str, float] = {method: _magnitude(row["clips"][method]) for method in METHODS}
    if any(not 0 < clip <= largest for clip in clips.values()):
        raise ValueError(f"{row['name']!r:.60} saturates at {clips}, not within 0 to {largest}")
    return TensorRange(
        name=_text(row["name"]),
        linears=tuple(_text(name) for name in _list(row["linears"])),
        channels=_count(row["channels"], 1),
        largest=largest,
        first_half=_magnitude(row["first_half"]),
        phases={phase: _magnitude(row["phases"][phase]) for phase in PHASES},
        clips=clips,
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.60} is no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    value.encode()
    return value


def _count(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{value!r:.60} is no count of at least {least}")
    return value


def _magnitude(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r:.60} is no magnitude")
    return float(value)
