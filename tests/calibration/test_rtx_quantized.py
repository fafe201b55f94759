"""TensorRT-RTX builds engines of quantized bundles for every compute capability that has the format, and computes in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from calibration_data.bundles import calibrated
from tensorrt_tools.engines import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    Engine,
    build_engines,
    profile,
    stripped_decoder,
)
from tensorrt_tools.runtimes import require_runtime

from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle
from mmm_export.manifest import QuantizedFormat

pytestmark = pytest.mark.slow

# FP8 is a type of Ada and later, see NVIDIA's support matrix.
CAPABILITIES = {
    "int8": ["8.0", "8.6", "8.9", "12.0"],
    "int8-weights": ["8.0", "8.6", "8.9", "12.0"],
    "int4": ["8.0", "8.6", "8.9", "12.0"],
    "fp8": ["8.9", "12.0"],
}


@pytest.fixture(scope="module")
def build(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[QuantizedFormat], list[Engine]]:
    """Engines of the tiny fp16 model in one format: prefill and decode profile, all compute capabilities."""
    made: dict[str, list[Engine]] = {}

    def make(form: QuantizedFormat) -> list[Engine]:
        require_runtime("rtx")
        if form not in made:
            folder = tmp_path_factory.mktemp("engine")
            bundle = make_bundle(make_checkpoint("linear"), dtype="fp16")
            options = QuantizeOptions(form, consumer="tensorrt-rtx", head="int8")
            quantize_bundle(bundle, calibrated(bundle, tmp_path_factory), folder / "quantized", options)
            model = stripped_decoder(folder / "quantized", folder)
            profiles = [profile(model, PREFILL_TOKENS), profile(model, DECODE_TOKENS)]
            made[form] = build_engines(folder, model, CAPABILITIES[form], profiles)
        return made[form]

    return make


@pytest.mark.parametrize("form", CAPABILITIES)
def test_an_engine_is_built_for_every_compute_capability_that_has_the_format(
    build: Callable[[QuantizedFormat], list[Engine]], form: QuantizedFormat
) -> None:
    for capability, engine in zip(CAPABILITIES[form], build(form), strict=True):
        assert engine.byte_count > 0, (capability, engine.errors)


@pytest.mark.parametrize(("form", "kind"), [("int8", "Int8"), ("fp8", "FP8")])
def test_products_of_quantized_activations_are_computed_in_the_format(
    build: Callable[[QuantizedFormat], list[Engine]], form: QuantizedFormat, kind: str
) -> None:
    for engine in build(form):
        for profile_index in (0, 1):
            products = [x for x in engine.layers if x.profile == profile_index and x.kind == "gemm"]
            quantized = [x for x in products if x.inputs[0].dtype == kind]
            whole = [x for x in products if x.inputs[0].dtype != kind]
            # Five linear maps a layer, of which gate and up may become one, and the head; delta's rows stay in 16 bits.
            assert len(quantized) >= 4 * 4
            assert all(x.outputs[0].dims.endswith(",4") for x in whole), whole


@pytest.mark.parametrize("form", ["int8-weights", "int4"])
def test_weights_stay_small_in_the_engine(
    build: Callable[[QuantizedFormat], list[Engine]], form: QuantizedFormat
) -> None:
    smallest = min(engine.byte_count for engine in build(form))
    # The constants of a tiny engine are little beside its code, so the claim is about what reads them: kernels that cast.
    assert smallest > 0
    names = [layer.name for layer in build(form)[1].layers if layer.profile == 0]
    assert sum("Cast" in name and ("Fc" in name or "Mul" in name) for name in names) >= 4 * 4
