"""Golden files: a bundle and an engine are held to what PyTorch computed, on a machine that has no PyTorch."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from fake_engine import install, write_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmm_export import names
from mmm_export.commands.verify import verify
from mmm_export.errors import BundleError, OptionError, PromptError
from mmm_export.exporter.golden import read_golden, write_golden
from mmm_export.manifest import read_manifest
from mmm_export.runtime.parity_runner import floats

CAPACITY = 256


@pytest.fixture(
    scope="module",
    params=[("linear", "fp32"), ("hybrid", "fp32"), pytest.param(("linear", "fp16"), marks=pytest.mark.slow)],
    ids="-".join,
)
def bundle(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> Path:
    kinds, dtype = request.param
    return make_bundle(make_checkpoint(kinds), max_tokens=CAPACITY, dtype=dtype, golden=True)


@pytest.fixture(scope="module")
def linear(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY, dtype="fp32", golden=True)


def run(*arguments: Any) -> Any:
    return verify.main([str(argument) for argument in arguments], standalone_mode=False)


WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
from mmm_export.commands.verify import verify
sys.exit(verify.main(sys.argv[1:], standalone_mode=False))
"""


def test_bundle_is_held_to_pytorch_where_there_is_no_pytorch(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch fp32 -> ONNX Runtime: image and text" in done.stdout
    assert "PyTorch fp32 -> ONNX Runtime: text" in done.stdout
    assert "greedy tokens: all 16 equal" in done.stdout
    assert "verdict: PASSED" in done.stdout


def test_the_provider_of_a_bundle_is_the_one_asked_for_and_named_in_the_report(
    linear: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(linear, "--provider", "cpu") == 0
    assert "PyTorch fp32 -> ONNX Runtime, cpu: text" in capsys.readouterr().out
    with pytest.raises(OptionError, match="no execution provider"):
        run(linear, "--provider", "abacus")


def test_a_provider_needs_golden_values(linear: Path, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(click.UsageError, match="--provider needs golden values"):
        run(linear, "--checkpoint", make_checkpoint("linear"), "--provider", "cpu")


def test_engine_is_held_to_the_golden_file_that_it_carries(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)
    write_engine(bundle, tmp_path / "engine")
    assert run(tmp_path / "engine") == 0
    told = capsys.readouterr().out
    assert "PyTorch fp32 -> tensorrt 10.3.0.30: image and text" in told
    assert "verdict: PASSED" in told


def test_engine_is_held_to_a_checkpoint_at_hand(
    linear: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch)
    write_engine(linear, tmp_path / "engine")
    report = tmp_path / "report.html"
    assert (
        run(tmp_path / "engine", "--checkpoint", make_checkpoint("linear"), "--new-tokens", 3, "--report", report) == 0
    )
    assert "greedy tokens: all 3 equal" in capsys.readouterr().out
    page = report.read_text()
    assert "plugin, tensorrt" in page
    assert "Error of each layer's state" in html.unescape(page)
    assert "Error of each layer's output" not in html.unescape(page)  # an engine shows no inner values


@pytest.mark.parametrize("what", ["logits", "steps", "states"])
def test_engine_that_computes_something_else_fails_and_says_where(
    what: str, linear: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = read_golden(linear / names.GOLDEN_FILE, read_manifest(linear))
    first = golden.examples[0]
    wanted = dataclasses.replace(first.wanted)
    if what == "logits":
        wanted.logits = wanted.logits[::-1]
    elif what == "steps":
        wanted.steps = [*wanted.steps[:-1], wanted.steps[-1] * 1.01]
    else:
        wanted.states = [*wanted.states[:-1], {name: array * 1.001 for name, array in wanted.states[-1].items()}]
    changed = dataclasses.replace(golden, examples=(dataclasses.replace(first, wanted=wanted), *golden.examples[1:]))
    write_golden(tmp_path / "other", changed)
    assert run(linear, "--golden", tmp_path / "other") == 1
    told = capsys.readouterr().out
    assert "verdict: FAILED" in told
    assert {"logits": "FAILED logits", "steps": "FAILED logits of step 8", "states": "FAILED layer"}[what] in told


def test_golden_file_comes_back_as_it_was_written(linear: Path, tmp_path: Path) -> None:
    manifest = read_manifest(linear)
    golden = read_golden(linear / names.GOLDEN_FILE, manifest)
    write_golden(tmp_path / "again", golden)
    again = read_golden(tmp_path / "again", manifest)
    assert [each.name for each in again.examples] == ["image and text", "text"]
    for one, other in zip(golden.examples, again.examples, strict=True):
        assert one.forced == other.forced
        np.testing.assert_array_equal(one.example.input_ids, other.example.input_ids)
        np.testing.assert_array_equal(one.wanted.logits, other.wanted.logits)
        for left, right in zip(one.wanted.states, other.wanted.states, strict=True):
            assert left.keys() == right.keys()


def test_golden_file_of_another_checkpoint_is_refused(linear: Path) -> None:
    other = dataclasses.replace(read_manifest(linear), source_sha256="f" * 64)
    with pytest.raises(BundleError, match="another checkpoint"):
        read_golden(linear / names.GOLDEN_FILE, other)


def test_golden_file_that_a_smaller_kv_cache_cannot_hold_is_refused(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    folder = make_bundle(make_checkpoint("hybrid"), max_tokens=CAPACITY, dtype="fp32", golden=True)
    small = dataclasses.replace(read_manifest(folder), max_tokens=10)
    with pytest.raises(PromptError, match="do not fit the KV cache"):
        read_golden(folder / names.GOLDEN_FILE, small)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "damaged"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "no golden file"),
        (b"no safetensors at all, but long enough", "damaged"),
    ],
)
def test_other_file_is_refused(content: bytes, told: str, linear: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(BundleError, match=told):
        read_golden(tmp_path / "other", read_manifest(linear))


def test_missing_file_and_newer_format_are_told(linear: Path, tmp_path: Path) -> None:
    manifest = read_manifest(linear)
    with pytest.raises(BundleError, match="is not there"):
        read_golden(tmp_path / "nothing", manifest)
    content = (linear / names.GOLDEN_FILE).read_bytes()
    (tmp_path / "newer").write_bytes(content.replace(b'"format":"1"', b'"format":"9"', 1))
    with pytest.raises(BundleError, match="another version"):
        read_golden(tmp_path / "newer", manifest)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_golden_file_is_one_clear_error_or_still_readable(
    data: st.DataObject, linear: Path, tmp_path: Path
) -> None:
    content = bytearray((linear / names.GOLDEN_FILE).read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    place = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (tmp_path / "damaged").write_bytes(content)
    with suppress(BundleError):  # anything else is raised
        read_golden(tmp_path / "damaged", read_manifest(linear))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--checkpoint", "a", "--golden", "b"), "not both"),
        (("--prompt", "Why?"), "--prompt needs --checkpoint"),
        (("--image", "a.jpg"), "--image needs --checkpoint"),
        (("--new-tokens", "3"), "--new-tokens needs --checkpoint"),
    ],
)
def test_contradicting_options_are_refused(arguments: tuple[str, ...], told: str, linear: Path) -> None:
    with pytest.raises(click.UsageError, match=told):
        run(linear, *arguments)


def test_bundle_without_golden_file_asks_for_one(linear: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(linear, tmp_path / "bundle"))
    (folder / names.GOLDEN_FILE).unlink()
    manifest = json.loads((folder / names.MANIFEST_FILE).read_text())
    del manifest["files"][names.GOLDEN_FILE]
    (folder / names.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(click.UsageError, match="--checkpoint CHECKPOINT or --golden FILE"):
        run(folder)


def test_bits_of_bfloat16_are_read_as_floats() -> None:
    exact = np.array([1.0, -2.5, 0.0, 3.140625], np.float32)  # all bfloat16 numbers
    bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(floats(bits, "bfloat16"), exact)
    assert floats(exact, "float32") is exact
