"""`mmm-export calibrate`: from a bundle and prompts to a quantized bundle, or to what quantizing would cost."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmm_export import names
from mmm_export.commands.options import PATH, as_json_text
from mmm_export.errors import OptionError
from mmm_export.manifest import CONSUMERS, QUANTIZED_FORMATS
from mmm_export.packages import require

if TYPE_CHECKING:
    from mmm_export.calibration.plan import QuantizeOptions
    from mmm_export.progress import Progress

ANALYSED = 8  # prompts that --analyze runs; each is run as often as there are linear maps


class SmoothType(click.ParamType):  # type: ignore[type-arg]
    """SmoothQuant's alpha, "auto" or "none"."""

    name = "alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn what was typed into a float or one of the words."""
        if value in ("auto", "none") or isinstance(value, float):
            return value
        try:
            alpha = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto nor none", param, ctx)
        if not 0 <= alpha <= 1:
            self.fail(f"{value} is not within 0 to 1", param, ctx)
        return alpha


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, metavar="QBUNDLE", help="Folder to write; not needed with --analyze.")
@click.option("--data", type=PATH, metavar="FILE", help="Prompts, one JSON object a line; see docs/quantization.md.")
@click.option(
    "--from",
    "calibration",
    type=PATH,
    metavar="FILE",
    help="A calibration.json of this bundle: measures nothing, so --data is not needed.",
)
@click.option(
    "--format", type=click.Choice(QUANTIZED_FORMATS), required=True, help="What weights, and activations, become."
)
@click.option(
    "--for",
    "consumer",
    type=click.Choice(CONSUMERS),
    default="reference",
    help="Who runs it: the graph gets the form that it runs best. reference: plain Q/DQ, exact in ONNX Runtime.",
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    default="mse",
    help="Where int8 activations saturate.",
)
@click.option(
    "--smooth",
    type=SmoothType(),
    default="auto",
    metavar="auto|none|ALPHA",
    help="Move magnitude from activations into weights (int8: SmoothQuant; int4: AWQ): searched for each layer, not at "
    "all, or with this exponent.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=128, metavar="LINES", help="Lines of --data to measure on."
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave this linear map as it is; repeatable; * matches.")
@click.option(
    "--head",
    type=click.Choice(["auto", "int8", "keep"]),
    default="auto",
    help="The head with int4: int8 weights or as it is; auto keeps it for tensorrt.",
)
@click.option("--threads", type=click.IntRange(min=1), show_default="one a core", help="To compute with.")
@click.option(
    "--analyze", is_flag=True, help="Write no bundle: tell what each linear map costs when it alone is quantized."
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NATS",
    help="With --analyze: recommend exceptions.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="With --analyze: within so many bytes of weights.",
)
@click.option("--report", type=PATH, metavar="FILE", help="With --analyze: also one HTML file, with a plot.")
@click.option("--json", "as_json", is_flag=True, help="With --analyze: print JSON.")
@click.option("--force", is_flag=True, help="Replace QBUNDLE, and the calibration beside it, if they are there.")
def calibrate(bundle: Path, output: Path | None, **given: Any) -> None:
    """Quantize the decoder of a BUNDLE by what its activations are on your prompts.

    Runs the prompts layer by layer, writes the calibration into the folder QBUNDLE.calibration, then the quantized
    bundle QBUNDLE. The calibration serves every format and consumer: give it to --from.

    \b
    Example:
      mmm-export calibrate build/bundle --data prompts.jsonl --format int8 -o build/int8
      mmm-export calibrate build/bundle --from build/int8.calibration/calibration.json \\
        --format int4 --for onnxruntime -o build/int4
      mmm-export calibrate build/bundle --data prompts.jsonl --format int8 --analyze --max-kl 0.01
    """
    require("export")
    from mmm_export import rendering
    from mmm_export.calibration.plan import QuantizeOptions
    from mmm_export.calibration.quantize import quantize_bundle
    from mmm_export.progress import console_progress

    _check_usage(output, given)
    names_of = ("format", "consumer", "method", "smooth", "skip", "head")
    options = QuantizeOptions(**{name: given[name] for name in names_of})
    progress = console_progress()
    with ExitStack() as stack:
        if output is None:
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "calibration"
        else:
            target = output.with_name(output.name + ".calibration")
            _refuse_existing(output, force=given["force"])
        file = given["calibration"] or _collect(bundle, target, options, given, progress)
        if given["analyze"]:
            _analyze(bundle, file, options, given, progress)
            return
        assert output is not None
        manifest = quantize_bundle(bundle, file, output, options, force=given["force"], progress=progress)
        click.echo(rendering.quantization_summary(output, manifest, file), err=True)


def _check_usage(output: Path | None, given: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together."""
    if given["data"] is None and (given["calibration"] is None or given["analyze"]):
        raise click.UsageError("--data is needed: prompts to measure on, one JSON object a line.")
    if given["analyze"]:
        if given["max_kl"] is not None and given["max_bytes"] is not None:
            raise click.UsageError("--max-kl and --max-bytes are two wishes; give one.")
        return
    if output is None:
        raise click.UsageError("-o is needed: the folder to write the quantized bundle into.")
    for name in ("max_kl", "max_bytes", "report", "as_json"):
        if given[name]:
            raise click.UsageError(f"--{name.replace('as_', '').replace('_', '-')} goes with --analyze.")


def _refuse_existing(output: Path, *, force: bool) -> None:
    """Refuse now what writing would refuse after minutes of measuring."""
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OptionError(f"{output} exists", wanted="a new folder", hint="--force replaces a bundle that is there")


def _collect(bundle: Path, target: Path, options: QuantizeOptions, given: dict[str, Any], progress: Progress) -> Path:
    from mmm_export import rendering
    from mmm_export.calibration.collect import CollectOptions, collect
    from mmm_export.calibration.plan import check_names
    from mmm_export.calibration.quantize import open_source
    from mmm_export.calibration.segments import Decoder

    manifest = open_source(bundle, options, progress)
    check_names(options.skip, Decoder(bundle, manifest).linears)  # a misspelling is told before minutes of measuring
    wanted = CollectOptions(samples=given["samples"], threads=given["threads"])
    calibration = collect(bundle, manifest, given["data"], target, wanted, force=given["force"], progress=progress)
    for line in rendering.calibration_warnings(calibration, given["samples"]):
        click.echo(line, err=True)
    return target / names.CALIBRATION_FILE


def _analyze(bundle: Path, file: Path, options: QuantizeOptions, given: dict[str, Any], progress: Progress) -> None:
    from mmm_export import rendering
    from mmm_export.calibration.sensitivity import analyze
    from mmm_export.calibration.sensitivity_report import COLUMNS, SHOWN, html_report, table_rows
    from mmm_export.output import output_file

    found = analyze(
        bundle,
        file,
        given["data"],
        options,
        samples=min(given["samples"], ANALYSED),
        max_kl=given["max_kl"],
        max_bytes=given["max_bytes"],
        threads=given["threads"],
        progress=progress,
    )
    if given["as_json"]:
        click.echo(as_json_text(dataclasses.asdict(found)))
    else:
        rows = table_rows([found.together, *found.costs[:SHOWN]])
        click.echo(rendering.sensitivity(COLUMNS, rows, len(found.costs) - SHOWN, found.recommendation))
    if given["report"]:
        with output_file(given["report"]) as path:
            path.write_text(html_report(found), encoding="utf-8")
