"""A tiny hybrid bundle, its prompts and its calibration, once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from calibration_data.bundles import calibrated, write_prompts

from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle


@pytest.fixture(scope="session")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    """An fp32 bundle with Mamba-2 and attention layers."""
    return make_bundle(make_checkpoint("hybrid"), max_tokens=256)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def calibration(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of its calibration.json."""
    return calibrated(bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def quantized(bundle: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantize the bundle, once for each set of options: `quantized("int8", consumer="onnxruntime")`."""
    made: dict[str, Path] = {}

    def make(form: str, **options: object) -> Path:
        key = repr((form, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "bundle"
            quantize_bundle(bundle, calibration, folder, QuantizeOptions(form, **options))  # type: ignore[arg-type]
            made[key] = folder
        return made[key]

    return make
