"""`mmm-export verify`: a bundle or an engine against the PyTorch model of its checkpoint, or against golden values."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mmm_export import names
from mmm_export.commands.options import PATH, kernels_option, provider_option
from mmm_export.packages import missing_packages, require

if TYPE_CHECKING:
    from mmm_export.exporter.verify_report import VerifyReport


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--checkpoint", type=PATH, help="Compare with this checkpoint, from which BUNDLE was made. Needs PyTorch."
)
@click.option(
    "--golden",
    type=PATH,
    metavar="FILE",
    show_default=f"{names.GOLDEN_FILE} in BUNDLE",
    help="Compare with a golden file of mmm-export onnx --golden. Needs no PyTorch.",
)
@click.option("--prompt", metavar="TEXT", show_default="a built-in one", help="Question to compare on.")
@click.option(
    "--image",
    "images",
    type=PATH,
    multiple=True,
    metavar="FILE",
    show_default="a pattern",
    help="Image to compare on; repeatable.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=8,
    metavar="TOKENS",
    help="Greedy tokens to compare after the prompt.",
)
@provider_option
@kernels_option
@click.option("--report", type=PATH, metavar="FILE", help="Also write the report as one HTML file, with plots.")
def verify(bundle: Path, checkpoint: Path | None, golden: Path | None, **options: Any) -> int:
    """Compare a BUNDLE, or an engine, with the PyTorch model of its checkpoint, layer by layer.

    With --checkpoint PyTorch runs here. Without it, values that PyTorch computed before, from a golden file, take its place: their
    prompts are fixed, and states, logits and tokens are compared, but not each layer's output. Only so --provider is taken.

    Compares embeddings, the output and states of every layer, logits, one long prefill against prefill and decode
    steps, and greedy tokens. Exit code 0 says that all are within their tolerances, 1 that something is not.

    \b
    Examples:
      mmm-export verify build/bundle --checkpoint mmMamba-linear --report parity.html
      mmm-export verify build/engine
      mmm-export verify build/bundle --provider cuda
    """
    from mmm_export import rendering
    from mmm_export.output import output_file

    if checkpoint and golden:
        raise click.UsageError("give --checkpoint or --golden, not both")
    if options["report"] and find_spec("matplotlib") is None:
        raise missing_packages(["matplotlib"])
    if checkpoint and options["providers"]:
        raise click.UsageError("--provider needs golden values (mmm-export onnx --golden), not --checkpoint")
    if checkpoint:
        report = _against_checkpoint(bundle, checkpoint, options)
    else:
        named = {"prompt": "--prompt", "images": "--image", "new_tokens": "--new-tokens"}
        source = click.get_current_context().get_parameter_source
        given = [option for name, option in named.items() if source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"{given[0]} needs --checkpoint: golden prompts are fixed")
        report = _against_golden(bundle, golden, options)
    from mmm_export.exporter.report import COLUMNS, html_report, table_rows, verdict_lines

    click.echo(rendering.verification(COLUMNS, table_rows(report), verdict_lines(report)))
    if options["report"]:  # after the table, which took minutes and is worth having even when the disk is full
        with output_file(options["report"]) as path:
            path.write_text(html_report(report), encoding="utf-8")
    return 0 if report.passed else 1


def _against_checkpoint(folder: Path, checkpoint: Path, options: dict[str, Any]) -> VerifyReport:
    require("export")
    from mmm_export.engine_manifest import folder_kind
    from mmm_export.exporter.verify import VerifyOptions, verify_bundle
    from mmm_export.progress import console_progress

    wanted = VerifyOptions(
        prompt=options["prompt"],
        images=options["images"],
        new_tokens=options["new_tokens"],
        kernels=options["kernels"],
    )
    progress = console_progress()
    if folder_kind(folder) != "engine":
        return verify_bundle(folder, checkpoint, wanted, progress=progress)
    from mmm_export.engine_manifest import read_engine_manifest
    from mmm_export.exporter.golden_recording import golden_from_examples
    from mmm_export.exporter.golden_verify import verify_golden
    from mmm_export.exporter.verify import open_source, prompt_example
    from mmm_export.runtime.parity_runner import ParityRunner

    manifest = read_engine_manifest(folder)
    source = open_source(checkpoint, manifest)
    example, notes = prompt_example(folder, manifest, wanted)
    # PyTorch first, and its weights gone before the engine takes the memory of a board that shares it.
    golden = golden_from_examples(
        source, manifest.source_sha256, {"prompt": example}, new_tokens=wanted.new_tokens, progress=progress
    )
    with ParityRunner.open(folder, kernels=wanted.kernels) as runner:
        return verify_golden(folder, manifest, golden, runner, origin=str(checkpoint), notes=notes, progress=progress)


def _against_golden(folder: Path, golden: Path | None, options: dict[str, Any]) -> VerifyReport:
    from mmm_export.engine_manifest import folder_kind, read_engine_manifest
    from mmm_export.exporter.golden import read_golden
    from mmm_export.exporter.golden_verify import verify_golden
    from mmm_export.manifest import read_manifest
    from mmm_export.progress import console_progress
    from mmm_export.runtime.parity_runner import ParityRunner

    progress = console_progress()
    manifest = read_engine_manifest(folder) if folder_kind(folder) == "engine" else read_manifest(folder)
    if golden is None and names.GOLDEN_FILE not in manifest.files:
        raise click.UsageError(f"{folder} holds no {names.GOLDEN_FILE}: give --checkpoint CHECKPOINT or --golden FILE")
    path = golden or folder / names.GOLDEN_FILE
    values = read_golden(path, manifest)
    with progress.stage("check files and load"):
        providers = list(options["providers"]) or None
        runner = ParityRunner.open(folder, kernels=options["kernels"], providers=providers)
    with runner:
        notes = [f"The scan was computed by {runner.kernels}."] if runner.kernels else []
        return verify_golden(folder, manifest, values, runner, origin=str(path), notes=notes, progress=progress)
