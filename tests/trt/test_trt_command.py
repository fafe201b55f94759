"""The command line of `mmm-export trt`: plans, lowered graphs for other tools, and the choice of the plugin."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorrt_tools.building import plugin_library

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.engine_plugin import choose_plugin
from mmm_export.errors import EngineError, KernelError
from mmm_export.exporter.trt import libraries
from mmm_export.plugins.library import ABI_VERSION
from trt import lowered

MACHINE = platform.machine()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_bundle: Callable[..., Path],
    no_device: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    bundle = tiny_bundle("hybrid")
    before = sorted(path.name for path in bundle.iterdir())
    assert run(cli, ["trt", str(bundle), "--target", "orin-jp62", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("orin-jp62, SM 8.7", "none here; planned for 10.3", "Jetson Orin Nano 8GB", "largest allocation"):
        assert words in said
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_a_plan_as_json_adds_up(
    tiny_bundle: Callable[..., Path], no_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle()
    assert run(cli, ["trt", str(bundle), "--target", "orin-jp62", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    memory = data["device_memory"]
    files = {name: (bundle / f"{name}.onnx.data").stat().st_size for name in ("decoder", "vision")}
    assert memory["weights_bytes"] == sum(files.values())
    parts = ("weights", "state", "kv_cache", "activation", "workspace")
    assert memory["with_cuda_bytes"] == sum(memory[f"{part}_bytes"] for part in parts) + (512 << 20)
    # Nothing is faster than its memory: a step reads the decoder's weights, and its states in and out.
    state = json.loads((bundle / "manifest.json").read_text())["model"]
    assert state["conv_width"] == 2
    for device in data["devices"]:
        assert device["most_tokens_per_s"] < device["bandwidth_gb_s"] * 1e9 / files["decoder"]


def test_without_an_output_it_is_wrong_usage(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["trt", str(tiny_bundle()), "--target", "rtx"]) == 2
    assert "give -o ENGINE, or --dry-run" in capsys.readouterr().err


def test_profiles_that_contradict_are_wrong_usage(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["trt", str(tiny_bundle()), "--target", "rtx", "--dry-run", "--prefill-tokens", "1,512,256"]
    assert run(cli, command) == 2
    assert "--prefill-tokens contradicts itself" in capsys.readouterr().err


def test_lowered_graphs_for_other_tools_run_in_onnx_runtime(
    tiny_bundle: Callable[..., Path], no_device: None, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    folder = tmp_path / "lowered"
    command = ["trt", str(tiny_bundle("hybrid")), "-o", str(folder), "--target", "orin-jp62", "--onnx-only"]
    assert run(cli, command) == 0
    assert not onnx.load(folder / "decoder.onnx", load_external_data=False).functions
    onnx.checker.check_model(folder / "decoder.onnx")
    opened = onnxruntime.InferenceSession(str(folder / "decoder.with-body.onnx"), providers=["CPUExecutionProvider"])
    assert {output.name for output in opened.get_outputs()} >= {"logits", "present.0.key", "present.1.recurrent"}
    assert all(
        path.stat().st_nlink == 1 for path in folder.iterdir()
    )  # its own: some readers refuse files with two names
    assert run(cli, command) == 1  # it exists
    assert run(cli, [*command, "--force"]) == 0


class TestPlugin:
    def test_none_was_built(self) -> None:
        with pytest.raises(EngineError, match="no plugin library was found") as caught:
            choose_plugin(None, (87,), "tensorrt", MACHINE)
        assert caught.value.hint == "mmm-export plugins build --cuda-arch 87"

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="is no file"):
            choose_plugin(tmp_path / "no.so", (87,), "tensorrt", MACHINE)

    def test_a_file_that_is_no_library(self, tmp_path: Path) -> None:
        (tmp_path / "no.so").write_bytes(b"text")
        with pytest.raises(KernelError):
            choose_plugin(tmp_path / "no.so", (87,), "tensorrt", MACHINE)

    def test_another_library_than_the_plugin(self, tmp_path: Path) -> None:
        other = plugin_library().parent / "mmm_mini_host"
        with pytest.raises((EngineError, KernelError)):
            choose_plugin(other, (87,), "tensorrt", MACHINE)

    def test_one_for_another_processor(self) -> None:
        with pytest.raises(EngineError, match="for another processor"):
            choose_plugin(plugin_library(), (87,), "tensorrt", "riscv64", any_device=True)

    def test_one_that_computes_on_the_cpu_is_taken_only_when_asked(self) -> None:
        with pytest.raises(EngineError, match=r"cannot run on SM 8\.6, SM 8\.9") as caught:
            choose_plugin(plugin_library(), (86, 89), "tensorrt-rtx", MACHINE)
        assert caught.value.found == "a library that computes on the CPU"
        chosen = choose_plugin(plugin_library(), (86, 89), "tensorrt-rtx", MACHINE, any_device=True)
        assert (chosen.info.architectures, chosen.info.abi, chosen.info.needed) == ((), ABI_VERSION, True)

    @pytest.mark.parametrize(
        ("there", "wanted", "runs"),
        [((80,), 87, True), ((87,), 86, False), ((86, 120), 121, True), ((90,), 100, False), ((87,), 110, False)],
    )
    def test_machine_code_runs_on_later_devices_of_its_generation(
        self, monkeypatch: pytest.MonkeyPatch, there: tuple[int, ...], wanted: int, runs: bool
    ) -> None:
        from mmm_export.plugins import inspection

        original = inspection.inspect_library
        monkeypatch.setattr(
            inspection, "inspect_library", lambda path: {**original(path), "architectures": list(there)}
        )
        if runs:
            assert choose_plugin(plugin_library(), (wanted,), "tensorrt", MACHINE).info.architectures == there
        else:
            with pytest.raises(EngineError, match="cannot run on") as caught:
                choose_plugin(plugin_library(), (wanted,), "tensorrt", MACHINE)
            assert "machine code for SM" in str(caught.value.found)


def test_an_engine_is_inspected_and_other_things_have_no_layers(
    tiny_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["inspect", str(tiny_bundle()), "--layers"]) == 2
    assert "--layers is for an engine" in capsys.readouterr().err
    folder = tmp_path / "engine"
    shutil.copytree(tiny_bundle(), folder)
    text = (folder / "manifest.json").read_text().replace('"kind": "bundle"', '"kind": "engine"')
    (folder / "manifest.json").write_text(text)
    assert run(cli, ["inspect", str(folder)]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_lowered_helper_counts_what_is_there(tiny_bundle: Callable[..., Path]) -> None:
    assert lowered.operator_counts(tiny_bundle() / "decoder.onnx")["MmmSelectiveScan"] == 4
