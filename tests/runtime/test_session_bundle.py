"""Sessions on exported bundles: equal to the oracle however a prompt is fed, and clear about what they cannot open."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from oracle.compare import relative_error
from oracle.model import OracleModel
from PIL import Image
from toy import text_ids, tiles

from mmm_export import names
from mmm_export.errors import BundleError, MmmError, OptionError, PromptError, StateFileError
from mmm_export.manifest import read_manifest, write_manifest
from mmm_export.model.testing import tiny_spec
from mmm_export.onnxruntime_support import has_linear_attention
from mmm_export.runtime import GenerationOptions, Session

TOKENS = 60
CAPACITY = 96

# The promise for fp32 bundles: float32 accumulation over 4 layers, with room for other CPUs' orders of summation.
FP32_ERROR = 2e-5


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def kinds(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(kinds: str, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(kinds)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(checkpoint, max_tokens=CAPACITY)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle, threads=1, chunk_tokens=16) as session:
        yield session


@pytest.fixture
def session(opened: Session) -> Session:
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def prompt(opened: Session) -> tuple[Any, Any]:
    """Token ids with two image tiles among them, and the tiles."""
    spec = opened.manifest.model
    ids = text_ids(spec, TOKENS)
    ids[20 : 20 + 2 * spec.vision.tokens_per_tile] = spec.image_token_id
    return ids, tiles(spec, 2)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, prompt: tuple[Any, Any]) -> Any:
    """Logits after every token of the prompt, (T, vocab), in float64."""
    return OracleModel.from_checkpoint(checkpoint).forward(*prompt).logits


def test_prefill_equals_the_oracle_for_every_chunk_length(bundle: Path, prompt: tuple[Any, Any], wanted: Any) -> None:
    for chunk_tokens in (1, 7, 21, 512):
        with Session.open(bundle, threads=1, chunk_tokens=chunk_tokens) as session:
            assert relative_error(session.prefill(*prompt), wanted[-1]) < FP32_ERROR


def test_split_prefills_and_steps_equal_the_oracle(session: Session, prompt: tuple[Any, Any], wanted: Any) -> None:
    ids, pixels = prompt
    ends = [1, 20, 45, 46]
    for begin, end in zip([0, *ends], ends, strict=False):
        logits = session.prefill(ids[begin:end], pixels if begin == 20 else None)
        assert relative_error(logits, wanted[end - 1]) < FP32_ERROR
    for position in range(46, TOKENS):
        assert relative_error(session.step(ids[position]), wanted[position]) < FP32_ERROR
    assert session.tokens == TOKENS


def test_each_image_may_come_with_its_own_call(session: Session, prompt: tuple[Any, Any], wanted: Any) -> None:
    ids, pixels = prompt
    middle = 20 + session.manifest.model.vision.tokens_per_tile
    session.prefill(ids[:middle], pixels[:1])
    logits = session.prefill(ids[middle:], pixels[1:])
    assert relative_error(logits, wanted[-1]) < FP32_ERROR


def test_saved_state_goes_on_in_another_session(
    session: Session, bundle: Path, prompt: tuple[Any, Any], wanted: Any, tmp_path: Path
) -> None:
    ids, pixels = prompt
    session.prefill(ids[:50], pixels)
    session.save_state(tmp_path / "state")
    kept = session.prefill(ids[50:])
    with Session.open(bundle, threads=1) as other:
        other.prefill([5, 6, 7])
        other.load_state(tmp_path / "state")
        loaded = other.prefill(ids[50:])
        assert other.tokens == TOKENS
    assert relative_error(loaded, wanted[-1]) < FP32_ERROR
    assert np.array_equal(loaded, kept)  # the same bits through the same graph, one thread


def test_two_sessions_of_one_process_do_not_disturb_each_other(
    session: Session, bundle: Path, prompt: tuple[Any, Any], wanted: Any
) -> None:
    ids, pixels = prompt
    with Session.open(bundle, threads=1) as other:
        session.prefill(ids[:46], pixels)
        other.prefill([9] * 30)
        logits = session.prefill(ids[46:])
    assert relative_error(logits, wanted[-1]) < FP32_ERROR


def test_logits_of_an_earlier_call_stay_as_they_were(session: Session) -> None:
    first = session.step(5)
    copy = first.copy()
    session.step(6)
    assert np.array_equal(first, copy)


def test_failed_run_of_a_graph_leaves_the_context(
    session: Session, prompt: tuple[Any, Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, pixels = prompt
    session.prefill(ids[:46], pixels)

    class Failing:
        def io_binding(self) -> Any:
            raise RuntimeError("out of memory\nand a long trace")

    with monkeypatch.context() as patch:
        patch.setattr(session._backend, "_decoder", Failing())
        with pytest.raises(MmmError) as caught:
            session.prefill(ids[46:])
    assert caught.value.found == "out of memory"
    assert session.tokens == 46
    assert relative_error(session.prefill(ids[46:]), wanted[-1]) < FP32_ERROR


def test_question_about_a_picture_is_answered_and_continued(session: Session, kinds: str) -> None:
    picture = Image.new("RGB", (56, 56), (200, 30, 30))
    options = GenerationOptions(max_new_tokens=5)
    ids, pixels = session.encode("What?", [picture])
    assert pixels is not None
    assert len(pixels) == 1
    if kinds == "hybrid":
        assert len(ids) > CAPACITY  # the default system text alone fills so small a KV cache
        with pytest.raises(PromptError, match="KV cache"):
            session.generate("What?", [picture], options)
        assert session.tokens == 0
        return
    answer = session.generate("What?", [picture], options)
    assert "".join(answer) == answer.text
    assert answer.statistics.prompt_tokens == len(ids)
    assert answer.finish_reason in ("length", "stop_token")
    follow_up = session.generate("And?", options=options)
    list(follow_up)
    assert follow_up.statistics.prompt_tokens < len(ids)


def test_memory_does_not_grow_with_the_prompt(session: Session, kinds: str) -> None:
    if kinds != "linear":
        pytest.skip("a KV cache is as long as it was exported")
    ids = text_ids(session.manifest.model, 4000)
    session.prefill(ids)
    sizes = [anonymous_kib()]
    for _ in range(3):
        session.prefill(np.tile(ids, 5))
        sizes.append(anonymous_kib())
    # 20,000 embeddings of 64 float32 would be 5 MiB each time; what the allocator, or another thread of the tests, takes comes once.
    assert min(np.diff(sizes)) < 2048, sizes


def anonymous_kib() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1])


def test_state_bytes_count_what_the_graph_takes(session: Session) -> None:
    decoder = session.manifest.graphs[names.DECODER_FILE]
    sizes = [np.prod(t.shape[1:]) * np.dtype(t.dtype).itemsize for t in decoder.inputs if t.name.startswith("past.")]
    assert session.state_bytes == sum(sizes)


def test_runtime_loads_neither_torch_nor_onnx(bundle: Path) -> None:
    program = (
        "import sys; from mmm_export.runtime import Session\n"
        f"Session.open({str(bundle)!r}, threads=1).prefill([5])\n"
        "print([name for name in ('torch', 'onnx', 'onnxscript', 'sentencepiece', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


# What cannot be opened


@pytest.fixture
def copy(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY), folder)
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **changes))


def test_bf16_bundle_on_a_cpu_is_refused_with_the_way_out(copy: Path) -> None:
    change_manifest(copy, dtype="bf16")
    with pytest.raises(BundleError) as caught:
        Session.open(copy)
    assert "CPU" in caught.value.what
    assert "--dtype fp32" in str(caught.value.hint)


def test_graph_that_is_not_the_manifests_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    change_manifest(copy, model=dataclasses.replace(manifest.model, head_dim=32))
    with pytest.raises(BundleError) as caught:
        Session.open(copy)
    assert names.DECODER_FILE in caught.value.what
    assert "past.0.conv" in str(caught.value.found)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("change", ["missing", "extra", "dtype", "shape"])
def test_inputs_and_outputs_are_compared_with_the_graph(copy: Path, side: str, change: str) -> None:
    manifest = read_manifest(copy)
    graph = manifest.graphs[names.VISION_FILE]
    (tensor,) = getattr(graph, side)
    changed = {
        "missing": (),
        "extra": (tensor, dataclasses.replace(tensor, name="more")),
        "dtype": (dataclasses.replace(tensor, dtype="float16"),),
        "shape": (dataclasses.replace(tensor, shape=(*tensor.shape[:-1], 17)),),
    }[change]
    graphs = {**manifest.graphs, names.VISION_FILE: dataclasses.replace(graph, **{side: changed})}
    change_manifest(copy, graphs=graphs)
    with pytest.raises(BundleError, match=r"vision\.onnx"):
        Session.open(copy)


def test_manifest_without_a_graph_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    change_manifest(copy, graphs={n: g for n, g in manifest.graphs.items() if n != names.VISION_FILE})
    with pytest.raises(BundleError, match=r"lists no vision\.onnx"):
        Session.open(copy)


def test_graph_that_onnx_runtime_cannot_read_is_refused(copy: Path) -> None:
    path = copy / names.EMBEDDING_FILE
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = b"\xff" * (len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        Session.open(copy)
    with pytest.raises(BundleError, match="ONNX Runtime cannot open"):
        Session.open(copy, check_content=False)


def test_content_check_can_be_left_out(copy: Path) -> None:
    path = copy / (names.EMBEDDING_FILE + names.WEIGHTS_SUFFIX)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        Session.open(copy)
    Session.open(copy, check_content=False).close()


def test_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="is not a bundle"):
            Session.open(path)


def test_state_of_another_bundle_is_refused(copy: Path, session: Session, tmp_path: Path) -> None:
    manifest = read_manifest(copy)
    first = dataclasses.replace(manifest.files[names.DECODER_FILE])
    with Session.open(copy, threads=1) as other:
        other._manifest = dataclasses.replace(
            manifest, files={**manifest.files, names.DECODER_FILE: dataclasses.replace(first, sha256="0" * 64)}
        )
        other.save_state(tmp_path / "state")
    with pytest.raises(StateFileError, match="another model"):
        session.load_state(tmp_path / "state")


def test_unknown_provider_is_told_with_those_there_are(copy: Path) -> None:
    with pytest.raises(OptionError) as caught:
        Session.open(copy, providers=["CPUExecutionProvide"])
    assert "CPUExecutionProvider" in str(caught.value.hint)
    assert "CPUExecutionProvider" in str(caught.value.wanted)
    with pytest.raises(OptionError):
        Session.open(copy, providers=["no-such-thing"])
    with pytest.raises(OptionError):
        Session.open(copy, providers=[])
    with Session.open(copy, providers=["cpu"], threads=1) as session:
        session.step(5)


@pytest.mark.parametrize("options", [{"chunk_tokens": 0}, {"threads": 0}, {"threads": -1}])
def test_option_out_of_range_is_refused(copy: Path, options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="out of range"):
        Session.open(copy, **options)  # type: ignore[arg-type]


def test_environment_of_the_manifest_is_set_while_graphs_are_opened_only(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "ALLOW_RELEASED_ONNX_OPSET_ONLY"
    change_manifest(copy, environment={variable: "0"})
    seen: list[str | None] = []

    class Recorded(onnxruntime.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            seen.append(os.environ.get(variable))
            super().__init__(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    for outside in (None, "1"):
        monkeypatch.delenv(variable, raising=False)
        if outside is not None:
            monkeypatch.setenv(variable, outside)
        Session.open(copy, threads=1).close()
        assert os.environ.get(variable) == outside
    assert seen == ["0"] * 6


def test_manifest_cannot_set_other_variables(copy: Path) -> None:
    change_manifest(copy, environment={"LD_PRELOAD": "x.so"})
    with pytest.raises(BundleError, match="environment variable"):
        Session.open(copy)
    assert "LD_PRELOAD" not in os.environ


def test_newer_schema_is_refused(copy: Path) -> None:
    path = copy / names.MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(BundleError, match="another schema"):
        Session.open(copy)


# Other kinds of bundles, as small as they come


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"logits": "all"},
        pytest.param(
            {"standard_ops": True},
            marks=pytest.mark.skipif(not has_linear_attention(), reason="this ONNX Runtime knows no opset 27"),
        ),
    ],
    ids=["fp16", "all-logits", "standard-ops"],
)
def test_other_bundles_equal_the_oracle_too(
    options: dict[str, Any], make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(tiny_spec(kinds=("mha", "mamba2"), embedding_layers=1))
    with Session.open(make_bundle(checkpoint, max_tokens=40, **options), threads=1, chunk_tokens=8) as session:
        spec = session.manifest.model
        ids = text_ids(spec, 30)
        ids[5 : 5 + spec.vision.tokens_per_tile] = spec.image_token_id
        pixels = tiles(spec, 1)
        wanted = OracleModel.from_checkpoint(checkpoint).forward(ids, pixels).logits
        found = session.prefill(ids[:-3], pixels)
        # float16 keeps 11 bits: some ten roundings of 5e-4 in a row through two layers.
        limit = 5e-3 if options.get("dtype") == "fp16" else FP32_ERROR
        assert relative_error(found, wanted[-4]) < limit
        for position in (27, 28, 29):
            found = session.step(ids[position])
        assert relative_error(found, wanted[-1]) < limit
        assert found.dtype == np.float32
