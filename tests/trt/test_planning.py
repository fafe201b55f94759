"""What cannot work is refused before anything is built, each time with what would work."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmm_export.errors import BundleError, EngineError, OptionError
from mmm_export.exporter.trt import device, libraries, planning
from mmm_export.exporter.trt.device import LocalDevice
from mmm_export.exporter.trt.planning import EngineOptions, EnginePlan, plan_engine
from mmm_export.exporter.trt.profiles import ProfileOptions, parse_range
from mmm_export.exporter.trt.targets import NAMES, TARGETS, parse_capabilities
from trt.conftest import ORIN

H100 = LocalDevice("H100", 90, 80 << 30, shared_memory=False)


def plan(bundle: Path, *, dry_run: bool = True, **options: object) -> EnginePlan:
    return plan_engine(bundle, EngineOptions(**options), dry_run=dry_run)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_every_target_has_a_plan_without_any_tensorrt(
    tiny_bundle: Callable[..., Path], no_device: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    found = plan(tiny_bundle(), target=name)
    assert found.library is None
    assert found.flavor == found.target.flavor
    assert found.operators.cached_attention == (name not in ("orin-jp62", "datacenter"))
    assert found.estimate.memory.weights_bytes > 0
    assert planning.devices_of(found)


def test_targets_differ_and_name_devices_of_their_own() -> None:
    assert len(set(NAMES)) == len(TARGETS)
    for target in TARGETS:
        assert target.oldest <= target.newest
        assert {each.capability for each in target.devices} <= set(target.capabilities)


class TestOptions:
    @pytest.mark.parametrize("text", ["512", "a,b,c", "1,2", "1,2,3,4", "1,-2,3", "1,,3", "1,2,99999999"])
    def test_a_range_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(OptionError, match="cannot be read"):
            parse_range(text)

    @pytest.mark.parametrize("tokens", [(1, 512, 256), (0, 1, 1), (9, 8, 10)])
    def test_a_range_that_contradicts_itself_is_refused(self, tokens: tuple[int, int, int]) -> None:
        with pytest.raises(OptionError, match="--prefill-tokens contradicts itself"):
            ProfileOptions(tokens)

    @pytest.mark.parametrize("text", ["", "x", "8.", "8.66", "8.6,x", "12345", "-1", "8", "\u00b2"])
    def test_a_capability_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(OptionError):
            parse_capabilities(text)

    def test_capabilities_are_read_sorted_and_once(self) -> None:
        assert parse_capabilities("12.0,8.6, 8.6,sm_89") == (86, 89, 120)

    @given(st.text(max_size=20))
    def test_any_text_gives_numbers_or_an_option_error(self, text: str) -> None:
        for read in (parse_range, parse_capabilities):
            try:
                found = read(text)
            except OptionError:
                continue
            assert all(isinstance(number, int) for number in found)

    def test_an_unknown_target_or_flavor_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(OptionError, match="unknown target") as caught:
            EngineOptions(target="nano")
        assert "orin-jp62" in str(caught.value.wanted)
        with pytest.raises(OptionError, match="unknown flavor"):
            EngineOptions(flavor="trt")  # type: ignore[arg-type]

    def test_a_cache_larger_than_the_bundles_is_refused(self, tiny_bundle: Callable[..., Path]) -> None:
        with pytest.raises(OptionError, match="more than the bundle's KV caches hold") as caught:
            plan(tiny_bundle("hybrid"), target="rtx", max_tokens=5000)
        assert "--max-tokens 5000" in str(caught.value.hint)

    def test_a_prompt_call_longer_than_the_cache_is_refused(self, tiny_bundle: Callable[..., Path]) -> None:
        with pytest.raises(OptionError, match="longer than the KV caches"):
            plan(tiny_bundle("hybrid"), target="rtx", max_tokens=64)

    def test_a_linear_model_has_no_cache_to_choose(self, tiny_bundle: Callable[..., Path]) -> None:
        assert plan(tiny_bundle(), target="rtx", max_tokens=64).sizes.max_tokens == 0

    def test_a_timing_cache_for_rtx_is_refused(self, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="not for TensorRT-RTX"):
            plan(tiny_bundle(), target="rtx", timing_cache=tmp_path / "cache")

    def test_rtx_on_a_jetson_is_refused(self, tiny_bundle: Callable[..., Path]) -> None:
        with pytest.raises(OptionError, match="has no TensorRT-RTX"):
            plan(tiny_bundle(), target="orin-jp62", flavor="tensorrt-rtx")

    def test_a_capability_that_rtx_lacks_is_refused(self, tiny_bundle: Callable[..., Path]) -> None:
        with pytest.raises(OptionError, match="does not build for this compute capability") as caught:
            plan(tiny_bundle(), target="rtx", capabilities=(86, 90))
        assert caught.value.found == "9.0"


class TestLibraries:
    def test_no_tensorrt_at_all(
        self, tiny_bundle: Callable[..., Path], no_device: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        with pytest.raises(EngineError, match="no TensorRT was found that can build here") as caught:
            plan(tiny_bundle())
        assert "--dry-run" in str(caught.value.hint)

    @pytest.mark.parametrize(("flavor", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
    def test_the_flavor_asked_for_is_missing(
        self, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flavor: str, module: str
    ) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        with pytest.raises(EngineError, match=f"no {flavor} was found") as caught:
            plan(tiny_bundle(), target="datacenter", flavor=flavor, dry_run=False)
        assert module in str(caught.value.wanted)
        assert "pip install" in str(caught.value.hint)

    def test_one_that_does_not_import_is_told_as_one(
        self, tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(EngineError, match="the installed tensorrt cannot be used") as caught:
            plan(tiny_bundle(), target="orin-jp62")
        assert "libnvinfer.so.10" in str(caught.value.found)

    def test_a_runtime_without_a_builder_is_no_library(
        self, tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tensorrt.py").write_text("__version__ = '10.3.0'")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(EngineError, match="cannot be used") as caught:
            plan(tiny_bundle(), target="orin-jp62")
        assert "it is a runtime only" in str(caught.value.found)

    def test_another_version_than_the_targets_is_refused(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None]
    ) -> None:
        stand_in("11.4.0.1")
        with pytest.raises(EngineError, match="target orin-jp62 runs another tensorrt") as caught:
            plan(tiny_bundle(), target="orin-jp62", dry_run=False)
        assert caught.value.wanted == "10.3 to 10.7"

    @pytest.mark.parametrize(("version", "target"), [("10.3.0.30", "orin-jp62"), ("11.4.1.2", "orin-jp72")])
    def test_auto_finds_the_jetpack_by_version(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None], version: str, target: str
    ) -> None:
        stand_in(version)
        found = plan(tiny_bundle(), dry_run=False)
        assert (found.target.name, found.capabilities, found.device) == (target, (87,), ORIN)


class TestDevices:
    def test_tensorrt_without_a_gpu_is_refused(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None]
    ) -> None:
        stand_in(here=None)
        with pytest.raises(EngineError, match="this machine shows no GPU"):
            plan(tiny_bundle(), target="orin-jp62", dry_run=False)

    def test_another_device_than_the_targets_is_refused(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None]
    ) -> None:
        stand_in(here=H100)
        with pytest.raises(EngineError, match="this device is not of target orin-jp62"):
            plan(tiny_bundle(), target="orin-jp62", dry_run=False)

    def test_tensorrt_for_another_capability_is_refused(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None]
    ) -> None:
        stand_in()
        with pytest.raises(OptionError, match="for the GPU that it runs on alone"):
            plan(tiny_bundle(), target="orin-jp62", capabilities=(89,), dry_run=False)

    def test_a_jetson_is_known_without_nvidia_smi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compatible = tmp_path / "compatible"
        compatible.write_text("nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
        monkeypatch.setattr(device, "_COMPATIBLE", compatible)
        found = device.local_device()
        assert found is not None
        assert (found.capability, found.shared_memory) == (87, True)
        assert found.memory_bytes > 1 << 30

    @pytest.mark.parametrize(
        ("said", "wanted"),
        [
            ("NVIDIA H100 80GB HBM3, 9.0, 81559 MiB\n", LocalDevice("NVIDIA H100 80GB HBM3", 90, 81559 << 20, False)),
            ("NVIDIA RTX, 12.0, 32607 MiB\nother, 8.6, 1 MiB\n", LocalDevice("NVIDIA RTX", 120, 32607 << 20, False)),
            ("Orin (nvgpu), [N/A], [N/A]\n", None),
            ("", None),
        ],
    )
    def test_what_nvidia_smi_says(self, monkeypatch: pytest.MonkeyPatch, said: str, wanted: LocalDevice | None) -> None:
        monkeypatch.setattr(device, "_nvidia_smi", lambda: said)
        monkeypatch.setattr(device, "_COMPATIBLE", Path("/nowhere"))
        assert device.local_device() == wanted


class TestBundles:
    def test_a_changed_file_is_refused(self, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
        folder = tmp_path / "bundle"
        shutil.copytree(tiny_bundle(), folder)
        data = bytearray((folder / "decoder.onnx.data").read_bytes())
        data[-1] ^= 1
        (folder / "decoder.onnx.data").write_bytes(data)
        with pytest.raises(BundleError, match="was changed"):
            plan(folder, target="rtx")

    @pytest.mark.parametrize(
        ("kind", "target", "words"),
        [
            (onnx.TensorProto.FLOAT8E4M3FN, "orin-jp62", "no FP8 arithmetic"),
            (onnx.TensorProto.FLOAT8E4M3FN, "rtx", "no FP8 arithmetic"),
            (onnx.TensorProto.FLOAT4E2M1, "datacenter", "no FP4 arithmetic"),
        ],
    )
    def test_a_number_format_that_the_device_lacks_is_refused(
        self, tiny_bundle: Callable[..., Path], tmp_path: Path, kind: int, target: str, words: str
    ) -> None:
        folder = with_zero_point(tiny_bundle(), tmp_path / "bundle", kind)
        with pytest.raises(EngineError, match=words) as caught:
            plan_engine(folder, EngineOptions(target=target), dry_run=True, check_content=False)
        assert "INT8" in str(caught.value.hint)

    def test_fp8_is_taken_where_it_exists(self, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
        folder = with_zero_point(tiny_bundle(), tmp_path / "bundle", onnx.TensorProto.FLOAT8E4M3FN)
        options = EngineOptions(target="rtx", capabilities=(89, 120))
        assert plan_engine(folder, options, dry_run=True, check_content=False).capabilities == (89, 120)

    def test_a_tensorrt_too_old_for_a_format_is_refused(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None], tmp_path: Path
    ) -> None:
        b200 = LocalDevice("B200", 100, 180 << 30, shared_memory=False)
        stand_in("10.3.0.30", here=b200)
        folder = with_zero_point(tiny_bundle(), tmp_path / "bundle", onnx.TensorProto.FLOAT4E2M1)
        options = EngineOptions(target="datacenter")
        with pytest.raises(EngineError, match="this TensorRT is too old for FP4"):
            plan_engine(folder, options, dry_run=False, check_content=False)


def with_zero_point(bundle: Path, folder: Path, kind: int) -> Path:
    """Copy a bundle and give its decoder an initializer of a number format, as quantized weights are."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    model.graph.initializer.append(onnx.TensorProto(name="zero_point", data_type=kind, dims=[2], raw_data=b"\0\0"))
    onnx.save(model, folder / "decoder.onnx")
    text = (folder / "manifest.json").read_text()
    before = (bundle / "decoder.onnx").stat().st_size
    (folder / "manifest.json").write_text(
        text.replace(f'"bytes": {before},', f'"bytes": {(folder / "decoder.onnx").stat().st_size},')
    )
    return folder


class TestMemory:
    def test_what_does_not_fit_is_refused_with_what_would(self, tiny_bundle: Callable[..., Path]) -> None:
        profiles = ProfileOptions((1, 512, 2048), max_batch=64)
        with pytest.raises(EngineError, match="cannot fit into the memory of the device") as caught:
            plan(tiny_bundle("hybrid"), target="rtx", profiles=profiles, device_memory_mib=600)
        hint = str(caught.value.hint)
        batch = int(hint.split("--max-batch ")[1].split(";")[0])
        smaller = dataclasses.replace(profiles, max_batch=batch)
        plan(tiny_bundle("hybrid"), target="rtx", profiles=smaller, device_memory_mib=600)
        larger = dataclasses.replace(profiles, max_batch=batch + 1)
        with pytest.raises(EngineError):
            plan(tiny_bundle("hybrid"), target="rtx", profiles=larger, device_memory_mib=600)

    def test_where_nothing_helps_it_says_so(self, tiny_bundle: Callable[..., Path]) -> None:
        with pytest.raises(EngineError, match="cannot fit") as caught:
            plan(tiny_bundle(), target="rtx", device_memory_mib=100)
        assert "a device with more memory" in str(caught.value.hint)

    def test_a_machine_too_small_for_rtx_to_build_is_refused(
        self, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planning, "machine_memory", lambda: (1 << 29, 1 << 28))
        library = libraries.Library("tensorrt-rtx", "tensorrt_rtx", "1.7.1.116")
        monkeypatch.setattr(planning, "require_library", lambda flavor: library)
        with pytest.raises(EngineError, match="too little memory to build"):
            plan(tiny_bundle(), target="rtx", dry_run=False)

    def test_a_busy_machine_is_a_finding(
        self, tiny_bundle: Callable[..., Path], stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in()
        monkeypatch.setattr(planning, "machine_memory", lambda: (1 << 29, 1 << 28))
        found = plan(tiny_bundle(), target="orin-jp62", dry_run=False)
        assert any("close other programs" in finding for finding in found.findings)
