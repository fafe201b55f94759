"""`mmm-export evaluate`: how often a model answers right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmm_export import names
from mmm_export.commands.options import PATH, as_json_text, inference_options, max_tiles_option
from mmm_export.packages import require


@click.command()
@click.argument("model", type=PATH)
@click.option("--task", required=True, metavar="digits|FILE", help="The demo task's test set, or a JSONL file.")
@click.option("--limit", type=click.IntRange(min=1), metavar="SAMPLES", show_default="all", help="Ask the first ones.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, metavar="TOKENS", help="Longest answer.")
@max_tiles_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="ROWS",
    help="Ask so many questions at once; a bundle only.",
)
@inference_options
@click.option("--answers", type=PATH, metavar="FILE", help="Also write every question, answer and truth, as JSONL.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: Path, task: str, limit: int | None, batch: int, answers: Path | None, as_json: bool, **rest: Any
) -> None:
    """Ask MODEL (a checkpoint, a bundle or an engine) questions with one true answer, and count the right ones.

    Prints the accuracy for each kind of question, with its 95 % interval (Wilson). An answer is right when it is the true
    one, letter case and a final full stop aside. Greedy, each question alone; a checkpoint is run by PyTorch in float32.

    A JSONL file has a line for each conversation, as InternVL trains on them: "image" and "conversations", and perhaps
    "kind". Of each conversation the first question is asked.

    \b
    Examples:
      mmm-export evaluate bundle --task digits
      mmm-export evaluate mmMamba-linear --task data.jsonl --answers answers.jsonl
    """
    from mmm_export.evaluation.samples import DIGITS

    if task == DIGITS:
        require("demo")
    if not (model / names.MANIFEST_FILE).is_file():
        require("export")
    from mmm_export.evaluation.answering import AnswerOptions, opened, opened_many
    from mmm_export.evaluation.samples import read_samples
    from mmm_export.evaluation.scoring import ask_all, ask_together, shares
    from mmm_export.output import output_file
    from mmm_export.progress import console_progress
    from mmm_export.rendering.evaluation import accuracy_table

    progress = console_progress()
    fields = ("max_new_tokens", "max_tiles", "threads", "kernels")
    options = AnswerOptions(providers=tuple(rest["providers"]), **{name: rest[name] for name in fields})
    with progress.stage("read the samples"):
        samples = read_samples(task, limit)
    title = f"ask {len(samples)} questions"
    if batch == 1:
        with opened(model, options) as (kind, answer), progress.stage(title) as advance:
            answered = ask_all(samples, answer, advance)
    else:
        with opened_many(model, options, batch) as (kind, many), progress.stage(f"{title}, {batch} at once") as advance:
            answered = ask_together(samples, many, advance)
    found = shares(answered)
    if answers is not None:
        lines = [
            {"name": one.sample.name, "kind": one.sample.kind, "question": one.sample.question}
            | {"truth": one.sample.answer, "answer": one.said, "right": one.is_right}
            for one in answered
        ]
        with output_file(answers) as path:
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    if as_json:
        by_kind = {name: share.to_json() for name, share in found.items() if name != "all"}
        report = {"model": str(model), "is": kind, "task": task, **found["all"].to_json(), "by_kind": by_kind}
        click.echo(as_json_text(report))
    else:
        click.echo(accuracy_table(found))
