"""Answers to a file of prompts: several at once, a line of JSON for each on stdout in the order of the file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmm_export.engine_manifest import folder_kind
from mmm_export.progress import console_progress
from mmm_export.prompt_file import Prompt, read_prompts

if TYPE_CHECKING:
    from mmm_export.runtime import Answered, GenerationOptions


def answer_file(
    bundle: Path,
    path: Path,
    options: GenerationOptions,
    rows: int | None,
    max_tiles: int | None,
    opening: Mapping[str, Any],
) -> bool:
    """Answer every prompt of a file; returns whether all were answered.

    Args:
        bundle: or an engine.
        path: of the file; relative image paths begin at its folder.
        options: of every answer.
        rows: answered at once; None for the default.
        max_tiles: of each image; None for the model's own limit.
        opening: the other arguments of `BatchSession.open`.

    Raises:
        PromptFileError: the file cannot be read, or a line of it is no prompt; nothing was answered.
        MmmError: as `BatchSession.open` and `BatchSession.step`.
    """
    from mmm_export import rendering
    from mmm_export.runtime import DEFAULT_ROWS, BatchSession, Question

    prompts = read_prompts(path)
    if rows is None:
        rows = 1 if folder_kind(bundle) == "engine" else DEFAULT_ROWS
    questions = (
        Question(prompt.question, tuple(path.parent / name for name in prompt.images), options, max_tiles)
        for prompt in prompts
    )
    with BatchSession.open(bundle, rows=min(rows, len(prompts)), **opening) as batch:
        begin = time.perf_counter()
        lines: dict[int, str] = {}  # of answers that came before those of earlier prompts
        told = failed = tokens = 0
        with console_progress().stage(f"answer {len(prompts)} prompts, {batch.rows} at once") as advance:
            for done in batch.answers(questions):
                lines[done.number] = json.dumps(_line(prompts[done.number], done), ensure_ascii=False)
                failed += done.error is not None
                tokens += done.answer.statistics.new_tokens if done.answer else 0
                while told in lines:
                    click.echo(lines.pop(told))
                    told += 1
                advance(1)
    click.echo(rendering.batch_statistics(len(prompts), failed, tokens, time.perf_counter() - begin), err=True)
    return not failed


def _line(prompt: Prompt, done: Answered) -> dict[str, Any]:
    line: dict[str, Any] = {"line": prompt.line, "prompt": prompt.question}
    if prompt.images:
        line["images"] = list(prompt.images)
    if done.answer is not None:
        counts = done.answer.statistics
        line |= {"answer": done.answer.text, "finish_reason": done.answer.finish_reason}
        line |= {"prompt_tokens": counts.prompt_tokens, "new_tokens": counts.new_tokens}
    if done.error is not None:
        line["error"] = "; ".join(filter(None, (done.error.what, done.error.found)))
    return line
