"""The whole flow on a small trained model and pictures it has never seen: what a new user runs first."""

from __future__ import annotations

import io
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmm_export import names
from mmm_export.errors import MmmError
from mmm_export.onnxruntime_support import best_body
from mmm_export.output import output_file, output_folder

if TYPE_CHECKING:
    from mmm_export.evaluation.samples import Sample

SHOWN = 18  # questions asked one by one: each kind twice
COUNTED = 180  # questions of the evaluation, those among them
MAX_TOKENS = 128  # of the KV cache in a hybrid or the teacher: a picture and a question are 48
PICTURES = "pictures"
PAGE = "demo.html"


@dataclass(frozen=True)
class Shown:
    """A question that was asked: the picture as PNG, the question, what the model said, and the truth."""

    picture: bytes
    kind: str
    question: str
    said: str
    truth: str
    is_right: bool


def demo_checkpoint(kind: str) -> Path:
    """Find a trained demo model, "linear", "hybrid" or "teacher", in the package or the checkout.

    Raises:
        MmmError: this installation has none.
    """
    import mmm_export

    folder = Path(mmm_export.__file__).parent / names.DEMO_MODELS / kind
    if not (folder / names.CONFIG_FILE).is_file():
        raise MmmError(
            f"the demo model {kind} is not there",
            found=f"no {names.CONFIG_FILE} in {folder}",
            wanted="the checkpoints that come with mmm-export",
            hint="install mmm-export again, or run from a checkout",
        )
    return folder


def run_demo(folder: Path, kind: str, run: Callable[[list[str]], int]) -> None:
    """Export, verify, count right answers, and ask; each step prints its title, its command and its time.

    Args:
        folder: gets `bundle/`, `pictures/`, `report.html` and `demo.html`; those of an earlier run are replaced.
        kind: which of the demo models.
        run: runs a command line of this program and returns its exit code; a failed one has told its error.

    Raises:
        MmmError: a step failed.
    """
    from mmm_export.evaluation.samples import read_samples

    begin = time.perf_counter()
    checkpoint, bundle, pictures = demo_checkpoint(kind), folder / "bundle", folder / PICTURES
    samples = read_samples("digits", SHOWN)
    _write_pictures(pictures, samples)
    first = pictures / _picture_name(0)
    steps: list[tuple[str, list[str]]] = [
        ("Look at the checkpoint", ["inspect", str(checkpoint)]),
        (
            "Export it to ONNX",
            [
                *("onnx", str(checkpoint), "-o", str(bundle), "--body", best_body(), "--force"),
                *([] if kind == "linear" else ["--max-tokens", str(MAX_TOKENS)]),
            ],
        ),
        (
            "Prove that the bundle computes what PyTorch computes",
            [
                *("verify", str(bundle), "--checkpoint", str(checkpoint), "--prompt", samples[0].question),
                *("--image", str(first), "--report", str(folder / "report.html")),
            ],
        ),
        (
            "Count right answers about pictures it has never seen",
            ["evaluate", str(bundle), "--task", "digits", "--limit", str(COUNTED)],
        ),
        ("Ask it", ["run", str(bundle), "--image", str(first), "--prompt", samples[0].question]),
    ]
    total = len(steps) + 1
    for number, (title, command) in enumerate(steps, start=1):
        click.echo(f"[{number}/{total}] {title}\n$ mmm-export {shlex.join(command)}")
        step_begin = time.perf_counter()
        if run(command) != 0:
            raise MmmError(f"the demonstration stopped at step {number} of {total}", found="the error above")
        click.echo(f"({time.perf_counter() - step_begin:.1f} s)\n")
    click.echo(f"[{total}/{total}] Ask it about more pictures of the test set\n")
    shown = ask(bundle, samples)
    _show(shown, pictures)
    from mmm_export.rendering.demo import demo_page

    page = folder / PAGE
    with output_file(page) as path:
        path.write_text(demo_page(kind, shown), encoding="utf-8")
    right = sum(one.is_right for one in shown)
    click.echo(f"{right} of {len(shown)} right. {page} shows them with their pictures.")
    click.echo(f"Done in {time.perf_counter() - begin:.0f} s. {folder} holds all that was written.")


def ask(bundle: Path, samples: Sequence[Sample]) -> list[Shown]:
    """Ask a bundle every sample."""
    from mmm_export.evaluation.answering import AnswerOptions, opened
    from mmm_export.evaluation.scoring import ask_all

    with opened(bundle, AnswerOptions()) as (_, answer):
        answered = ask_all(samples, answer)
    return [
        Shown(_png(one.sample), one.sample.kind, one.sample.question, one.said.strip(), one.sample.answer, one.is_right)
        for one in answered
    ]


def _show(shown: Sequence[Shown], pictures: Path) -> None:
    from mmm_export.rendering.demo import picture_lines, shows_pictures

    drawn = shows_pictures()
    for number, one in enumerate(shown):
        if drawn and number < len(shown) // 2:  # each kind once: pictures are long
            click.echo("\n".join(picture_lines(one.picture)))
        click.echo(f"{pictures / _picture_name(number)}\n  {one.question}")
        click.echo(f"  answer: {one.said}   truth: {one.truth}   {'right' if one.is_right else 'WRONG'}\n")


def _write_pictures(folder: Path, samples: Sequence[Sample]) -> None:
    with output_folder(folder, force=True, marker=_picture_name(0)) as temporary:
        for number, sample in enumerate(samples):
            (temporary / _picture_name(number)).write_bytes(_png(sample))


def _picture_name(number: int) -> str:
    return f"test-{number:02}.png"


def _png(sample: Sample) -> bytes:
    from mmm_export.images import load_image

    stream = io.BytesIO()
    load_image(sample.images[0]).save(stream, format="PNG")
    return stream.getvalue()
