"""`mmm-export run --prompts` and `evaluate --batch`: many answers at once are those of one by one, in the order of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmm_export.cli import cli
from mmm_export.command_line import run

FAST = ["--kernels", "none", "--threads", "1"]


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(make_checkpoint("linear"), max_tokens=96)  # as tests/runtime's


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.linear_gradient("L").convert("RGB").save(folder / "photo.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "What is it?", "images": ["photo.png"]},
        {"prompt": "Who?"},
        {"image": "photo.png", "conversations": [{"from": "human", "value": "<image>\nWhere?"}]},
        {"prompt": "When, and why so late?"},
    ]
    path = folder / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def answers(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> list[dict[str, Any]]:
    assert run(cli, arguments) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_prompt_of_a_file_is_answered_as_if_it_were_alone(
    bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "5", "--temperature", "0.8", "--seed", "3", *FAST]
    found = answers(["run", str(bundle), "--prompts", str(prompts), "--batch", "3", *options], capsys)
    assert [line["line"] for line in found] == [1, 3, 5, 7]
    assert [line["prompt"] for line in found] == ["What is it?", "Who?", "<image>\nWhere?", "When, and why so late?"]
    assert [line.get("images") for line in found] == [["photo.png"], None, ["photo.png"], None]
    for line in found:
        single = ["run", str(bundle), "--prompt", line["prompt"], *options]
        for name in line.get("images", ()):
            single += ["--image", str(prompts.parent / name)]
        assert run(cli, single) == 0
        assert capsys.readouterr().out == line["answer"] + "\n"
        assert line["new_tokens"] <= 5


def test_one_prompt_that_fails_is_told_in_its_line_and_by_the_exit_code(
    bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompts.parent / "photo.png").write_bytes(b"no image")
    command = ["run", str(bundle), "--prompts", str(prompts), "--max-new-tokens", "3", *FAST]
    assert run(cli, command) == 1
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert ["error" in line for line in found] == [True, False, True, False]
    assert "photo.png" in found[0]["error"]
    assert found[1]["new_tokens"] == 3
    assert "4 prompts, 2 of them not answered" in shown.err


def test_a_broken_line_is_told_before_anything_is_answered(
    bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text('{"prompt": "fine"}\n{"prompt": 3}\n', encoding="utf-8")
    assert run(cli, ["run", str(bundle), "--prompts", str(prompts), *FAST]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "line 2" in shown.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "Hi"], "--prompts FILE goes with neither"),
        (["--interactive"], "--prompts FILE goes with neither"),
        (["--image", "x.png"], "--image does not go with --prompts"),
        (["--save-state", "x.state"], "--save-state does not go with --prompts"),
        (["--state-cache", "x"], "--state-cache does not go with --prompts"),
    ],
)
def test_options_of_one_conversation_do_not_go_with_a_file(
    bundle: Path, prompts: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["run", str(bundle), "--prompts", str(prompts), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_batch_needs_a_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["run", str(bundle), "--prompt", "Hi", "--batch", "2"]) == 2
    assert "--batch goes with --prompts FILE" in capsys.readouterr().err


def test_questions_asked_together_are_scored_as_those_asked_one_by_one(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"conversations": [{"from": "human", "value": f"{'so ' * n}{n}?"}, {"from": "gpt", "value": "yes"}]}
        for n in range(5)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    said = []
    for batch in ("1", "3"):
        file = tmp_path / f"answers-{batch}.jsonl"
        command = ["evaluate", str(bundle), "--task", str(task), "--batch", batch, "--answers", str(file), "--json"]
        report = json.loads(json.dumps(answers_report([*command, "--max-new-tokens", "6", *FAST], capsys)))
        assert report["total"] == 5
        said.append(file.read_text(encoding="utf-8"))
    assert said[0] == said[1]


def answers_report(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert run(cli, arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_is_asked_one_question_at_a_time(
    make_checkpoint: Callable[..., Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "task.jsonl").write_text(json.dumps({"conversations": turns}), encoding="utf-8")
    command = ["evaluate", str(make_checkpoint("linear")), "--task", str(tmp_path / "task.jsonl"), "--batch", "2"]
    assert run(cli, command) == 2
    assert "only a bundle answers several questions at once" in capsys.readouterr().err
