"""The whole flow on a tiny random model and a photograph: what a new user runs first."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import click

from mmm_export import names
from mmm_export.errors import MmmError
from mmm_export.onnxruntime_support import best_body
from mmm_export.output import output_file, output_folder

QUESTION = "What is in the picture?"
NEW_TOKENS = 24
# Seed 0 of a random model: any seed is as good, one seed makes two runs comparable.
SEED = 0


def run_demo(folder: Path, run: Callable[[list[str]], int]) -> None:
    """Write, export, verify and ask; each step prints its title, its command and its time.

    Args:
        folder: gets `checkpoint/`, `bundle/`, `report.html` and `photograph.png`; those of an earlier run are replaced.
        run: runs a command line of this program and returns its exit code; a failed one has told its error.

    Raises:
        MmmError: a step failed.
    """
    begin = time.perf_counter()
    checkpoint, bundle, photograph = folder / "checkpoint", folder / "bundle", folder / "photograph.png"
    steps: list[tuple[str, list[str]]] = [
        ("Look at the checkpoint", ["inspect", str(checkpoint)]),
        ("Export it to ONNX", ["onnx", str(checkpoint), "-o", str(bundle), "--body", best_body(), "--force"]),
        (
            "Prove that the bundle computes what PyTorch computes",
            [
                *("verify", str(bundle), "--checkpoint", str(checkpoint)),
                *("--image", str(photograph), "--report", str(folder / "report.html")),
            ],
        ),
        (
            "Ask it about a photograph",
            ["run", str(bundle), "--prompt", QUESTION, "--image", str(photograph), "--max-new-tokens", str(NEW_TOKENS)],
        ),
    ]
    total = len(steps) + 1
    click.echo(
        "The weights of this model are random, so its answer is nonsense; all else is as with a trained model.\n"
    )

    _announce(1, total, "Write a tiny checkpoint in the released layout, and a photograph")
    step_begin = time.perf_counter()
    vocabulary = _write_inputs(checkpoint, photograph)
    click.echo(f"(vocabulary: {vocabulary}; {time.perf_counter() - step_begin:.1f} s)\n")

    for number, (title, command) in enumerate(steps, start=2):
        _announce(number, total, title)
        click.echo(f"$ mmm-export {shlex.join(command)}")
        step_begin = time.perf_counter()
        if run(command) != 0:
            raise MmmError(f"the demonstration stopped at step {number} of {total}", found="the error above")
        click.echo(f"({time.perf_counter() - step_begin:.1f} s)\n")
    click.echo(f"Done in {time.perf_counter() - begin:.0f} s. {folder} holds all that was written.")


def _announce(number: int, total: int, title: str) -> None:
    click.echo(f"[{number}/{total}] {title}")


def _write_inputs(checkpoint: Path, photograph: Path) -> str:
    """Write the model and the picture; returns where the vocabulary comes from."""
    from mmm_export.model.testing import tiny_spec, vocab_size_for, write_checkpoint

    tokenizer = _real_vocabulary()
    sizes = {"vocab_size": vocab_size_for(tokenizer)} if tokenizer else {}
    spec = tiny_spec(
        heads=4, kv_heads=2, head_dim=64, embedding_layers=2, llm_layers=6, tile_size=448, patch_size=14, **sizes
    )
    with output_folder(checkpoint, force=True, marker=names.CONFIG_FILE) as temporary:
        write_checkpoint(temporary, spec, seed=SEED, dtype="bf16", tokenizer=tokenizer)
    _write_photograph(photograph)
    return "32 thousand pieces of mistral-common" if tokenizer else "a small one, since mistral-common is not installed"


def _real_vocabulary() -> Path | None:
    """Find the SentencePiece model that mistral-common ships, without importing that package and all it needs."""
    spec = find_spec("mistral_common")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "data" / "tokenizer.model.v1"
        if path.is_file():
            return path
    return None


def _write_photograph(path: Path) -> None:
    """Save scikit-image's picture of Eileen Collins (NASA, public domain), 512 x 512: one tile."""
    from PIL import Image
    from skimage import data

    with output_file(path) as temporary:
        Image.fromarray(cast(Any, data).astronaut()).save(temporary, format="PNG")
