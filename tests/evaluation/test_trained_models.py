"""The shipped demo models reach the accuracy that the result file states, in PyTorch and, answer for answer, in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.demo import demo_checkpoint
from mmm_export.evaluation.answering import AnswerOptions, opened
from mmm_export.evaluation.samples import digits_samples
from mmm_export.evaluation.scoring import Answered, ask_all, shares
from mmm_export.model.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "digits-distillation.json").read_text(encoding="utf-8"))
MODELS: dict[str, dict[str, Any]] = {row["model"]: row for row in RESULTS["rows"] if row["name"] == "model"}
QUICK = 108  # samples: each kind of question twelve times
MOST_BYTES = 12_000_000  # of a checkpoint: a repository is no place for more
MOST_BYTES_IN_ALL = 30_000_000


def answers(model: Path, count: int) -> list[Answered]:
    with opened(model, AnswerOptions(kernels="none", threads=1)) as (_, answer):
        return ask_all(list(digits_samples(count)), answer)


@pytest.mark.parametrize("kind", MODELS)
def test_a_shipped_model_is_as_good_on_the_first_samples_as_stated_for_all(kind: str) -> None:
    found = shares(answers(demo_checkpoint(kind), QUICK))["all"]
    # Wilson's interval of the small sample holds the stated accuracy; 95 % of samples would, and this one is always the same.
    low, high = found.interval
    assert low <= MODELS[kind]["accuracy"] <= high


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_shipped_model_gets_exactly_the_stated_answers_right(kind: str) -> None:
    found = shares(answers(demo_checkpoint(kind), 1000))["all"]
    assert (found.right, found.total) == (MODELS[kind]["right"], MODELS[kind]["samples"])


def test_onnx_runtime_gives_the_answers_of_pytorch(make_bundle: Callable[..., Path]) -> None:
    checkpoint = demo_checkpoint("hybrid")
    bundle = make_bundle(checkpoint, max_tokens=128)
    assert [one.said for one in answers(bundle, QUICK)] == [one.said for one in answers(checkpoint, QUICK)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_onnx_runtime_gives_the_answers_of_pytorch_to_the_last_sample(
    kind: str, make_bundle: Callable[..., Path]
) -> None:
    checkpoint = demo_checkpoint(kind)
    bundle = make_bundle(checkpoint, max_tokens=128)
    assert [one.said for one in answers(bundle, 1000)] == [one.said for one in answers(checkpoint, 1000)]


def test_the_results_say_that_onnx_runtime_answered_alike() -> None:
    assert {kind: row["other_answers"] for kind, row in MODELS.items()} == dict.fromkeys(MODELS, 0)


def test_shipped_models_are_small_and_whole() -> None:
    sizes = {}
    for kind in ("teacher", "linear", "hybrid"):
        folder = demo_checkpoint(kind)
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.findings == ()
        assert checkpoint.dtype == "bf16"
        sizes[kind] = sum(file.stat().st_size for file in folder.iterdir())
    assert max(sizes.values()) <= MOST_BYTES
    assert sum(sizes.values()) <= MOST_BYTES_IN_ALL


def test_evaluate_prints_and_writes_what_it_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(demo_checkpoint("teacher")), "--task", "digits", "--limit", "18", "--json"]
    assert run(cli, [*command, "--answers", str(tmp_path / "answers.jsonl")]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report["is"] == "checkpoint"
    assert report["total"] == len(lines) == 18
    assert report["right"] == sum(line["right"] for line in lines)
    assert sum(share["total"] for share in report["by_kind"].values()) == 18
    for line in lines:
        assert line["right"] == (line["answer"].strip().lower() == line["truth"])


def test_evaluate_refuses_a_folder_that_holds_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["evaluate", str(tmp_path), "--task", "digits", "--limit", "1"]) == 1
    assert "holds no model" in capsys.readouterr().err
