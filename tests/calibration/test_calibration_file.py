"""calibration.json: what is written is read, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmm_export import names
from mmm_export.calibration.calibration_file import Samples, read_calibration
from mmm_export.calibration.quantize import check_calibration
from mmm_export.errors import CalibrationError
from mmm_export.manifest import FileInfo, read_manifest


def test_it_says_what_was_measured_and_of_which_bundle(bundle: Path, calibration: Path) -> None:
    found = read_calibration(calibration)
    assert found.bundle_sha256 == read_manifest(bundle).model_sha256
    assert found.samples == 6
    assert all(found.tokens[phase] > 0 for phase in ("image", "text", "step"))
    samples = Samples(calibration.parent, found)
    for tensor in found.tensors:
        observed = samples.of(tensor.name)
        assert tensor.largest == pytest.approx(float(observed.maxima.max()), rel=1e-6)
        assert max(tensor.phases.values()) == pytest.approx(tensor.largest, rel=1e-6)
        assert observed.rows.shape[1] == tensor.channels
        # Rows are float16 in units of the largest magnitude: 11 bits, and never beyond it.
        assert (np.abs(observed.rows).max(0) <= observed.maxima + 2.0**-11 * tensor.largest).all()


def test_a_calibration_of_another_bundle_is_refused(bundle: Path, calibration: Path) -> None:
    manifest = read_manifest(bundle)
    check_calibration(read_calibration(calibration), manifest, calibration)
    files = {**manifest.files, names.DECODER_FILE: FileInfo(1, "0" * 64)}
    with pytest.raises(CalibrationError, match="calibration of another bundle"):
        check_calibration(read_calibration(calibration), dataclasses.replace(manifest, files=files), calibration)


def test_samples_that_are_missing_or_of_another_calibration_are_refused(calibration: Path, tmp_path: Path) -> None:
    found = read_calibration(calibration)
    with pytest.raises(CalibrationError, match="samples of the calibration are missing"):
        Samples(tmp_path, found)
    shutil.copy(calibration.parent / names.SAMPLES_FILE, tmp_path)
    with (tmp_path / names.SAMPLES_FILE).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CalibrationError, match="belongs to another calibration"):
        Samples(tmp_path, found)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(tmp_path / "calibration.json")
    (tmp_path / "calibration.json").write_bytes(b"\xff{")
    with pytest.raises(CalibrationError, match="no calibration, or a damaged one"):
        read_calibration(tmp_path / "calibration.json")


def paths_in(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix, *(path for key, value in inside for path in paths_in(value, (*prefix, key)))]


_JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_it_a_value_is_sensible_or_refused(calibration: Path, tmp_path: Path, data: Any) -> None:
    content = json.loads(calibration.read_text())
    content["tensors"] = content["tensors"][:1]
    *way, last = data.draw(st.sampled_from(paths_in(content)[1:]))
    place = content
    for key in way:
        place = place[key]
    place[last] = data.draw(_JUNK)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    try:
        found = read_calibration(path)
    except CalibrationError:
        return
    assert all(0 < clip <= tensor.largest < np.inf for tensor in found.tensors for clip in tensor.clips.values())
