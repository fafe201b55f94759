"""The command `mmm-export`: parse, call one stage, print. Heavy imports live inside commands, so help is instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mmm_export import __version__
from mmm_export.command_line import PROGRAM, FlowGroup, run
from mmm_export.packages import require
from mmm_export.spec import MOST_TOKENS

PATH: Any = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


def kernels_option(command: Command) -> Command:
    """Give a command the option --kernels."""
    return click.option(
        "--kernels",
        default="auto",
        metavar="auto|none|FILE",
        help="What computes the scan: the library that `mmm-export plugins build` made, if it did; the function in the "
        "bundle; or this library.",
    )(command)


EPILOG = f"""\b
The flow, from a checkpoint to text:
  {PROGRAM} onnx CHECKPOINT -o BUNDLE               export to ONNX
  {PROGRAM} verify BUNDLE --checkpoint CHECKPOINT   prove that it computes the same
  {PROGRAM} run BUNDLE --prompt TEXT --image FILE   ask it something
Each command explains itself: {PROGRAM} COMMAND --help"""


@click.group(
    cls=FlowGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("--verbose", is_flag=True, help="Print the traceback of a failure.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Deploy mmMamba, the multimodal Mamba-2 model: checkpoint to ONNX to text, with every hop checked."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="BUNDLE", help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    help="Number format of weights and activations; SSM states stay float32. Use fp32 or fp16 for a CPU.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=MOST_TOKENS),
    default=4096,
    metavar="TOKENS",
    help="KV cache capacity of a model with attention layers; each step costs time by it. A linear model has none and no limit.",
)
@click.option(
    "--body",
    type=click.Choice(["linear-attention", "standard"]),
    default="linear-attention",
    help="How the scan is spelt for a runtime without our operator: around ONNX Runtime's LinearAttention, "
    "or in standard operators alone.",
)
@click.option(
    "--standard-ops",
    is_flag=True,
    help="Write opset-27 LinearAttention and CausalConvWithState nodes instead of our operator. ONNX Runtime loads "
    "them only with ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in its environment; the bundle's manifest says so.",
)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    help="Positions that the decoder gives logits for.",
)
@click.option(
    "--rope-scaling",
    type=click.Choice(["ignore", "teacher"]),
    default="ignore",
    help="Rotary scaling of attention layers: none, as the released hybrid computes, or what config.json asks for.",
)
@click.option("--force", is_flag=True, help="Replace BUNDLE if it is a bundle already.")
def onnx(checkpoint: Path, output: Path, force: bool, **options: Any) -> None:
    """Export a CHECKPOINT folder to a BUNDLE of ONNX graphs.

    The bundle holds vision, embedding and decoder graphs, their weights, the tokenizer and a manifest with the hash of
    every file. It is written under a temporary name and renamed when complete.

    \b
    Example:
      mmm-export onnx mmMamba-linear -o build/bundle --dtype fp16
    """
    require("export")
    from mmm_export import rendering
    from mmm_export.exporter.bundle import ExportOptions, export_bundle
    from mmm_export.progress import console_progress

    manifest = export_bundle(checkpoint, output, ExportOptions(**options), force=force, progress=console_progress())
    click.echo(rendering.export_summary(output, manifest), err=True)


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--checkpoint", type=PATH, required=True, help="The checkpoint that the bundle was exported from.")
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
@kernels_option
@click.option("--report", type=PATH, metavar="FILE", help="Also write the report as one HTML file, with plots.")
def verify(bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], **rest: Any) -> int:
    """Compare a BUNDLE with the PyTorch model of its checkpoint, layer by layer.

    Compares embeddings, the output and states of every layer, logits, one long prefill against prefill and decode
    steps, and greedy tokens. Exit code 0 says that all are within their tolerances, 1 that something is not.

    \b
    Example:
      mmm-export verify build/bundle --checkpoint mmMamba-linear --report parity.html
    """
    require("export")
    from mmm_export import rendering
    from mmm_export.exporter.report import COLUMNS, html_report, table_rows, verdict_lines
    from mmm_export.exporter.verify import VerifyOptions, verify_bundle
    from mmm_export.output import output_file
    from mmm_export.progress import console_progress

    options = VerifyOptions(prompt=prompt, images=images, new_tokens=rest["new_tokens"], kernels=rest["kernels"])
    report = verify_bundle(bundle, checkpoint, options, progress=console_progress())
    click.echo(rendering.verification(COLUMNS, table_rows(report), verdict_lines(report)))
    if rest["report"]:  # after the table, which took minutes and is worth having even when the disk is full
        with output_file(rest["report"]) as path:
            path.write_text(html_report(report), encoding="utf-8")
    return 0 if report.passed else 1


@cli.command(name="run")
@click.argument("bundle", type=PATH)
@click.option("--prompt", metavar="TEXT", help="Question; - reads it from stdin.")
@click.option("--image", "images", type=PATH, multiple=True, metavar="FILE", help="Image to ask about; repeatable.")
@click.option("--interactive", is_flag=True, help="Converse; /help lists what else it takes. Reads a pipe too.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, metavar="TOKENS", help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token always.")
@click.option("--top-k", type=int, default=0, metavar="TOKENS", help="Keep the k likeliest; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, help="Keep the likeliest that reach this probability.")
@click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: repeat less.")
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="NUMBER", show_default="drawn anew", help="Same seed, same answer."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable.")
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1),
    metavar="TILES",
    show_default="the model's own limit",
    help="Cut each image into at most so many.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1),
    default=512,
    metavar="TOKENS",
    help="Prompt tokens read at once; bounds the memory.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="THREADS", show_default="all cores", help="CPU threads.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME",
    show_default="cpu",
    help="ONNX Runtime provider, such as cuda; repeatable.",
)
@kernels_option
@click.option("--load-state", type=PATH, metavar="FILE", help="Continue a saved conversation.")
@click.option("--save-state", type=PATH, metavar="FILE", help="Save the conversation at the end.")
@click.option("--no-check", is_flag=True, help="Skip comparing the files with their hashes: starts faster.")
def run_bundle(bundle: Path, prompt: str | None, interactive: bool, **rest: Any) -> int:
    """Answer a prompt about text and images with a BUNDLE, or converse.

    The answer streams to stdout; speed, token counts and the reason why it ended go to stderr.

    \b
    Examples:
      mmm-export run build/bundle --prompt "What is in the picture?" --image photo.jpg
      mmm-export run build/bundle --interactive --save-state talk.state
    """
    if prompt is None and not interactive:
        raise click.UsageError("give --prompt TEXT or --interactive")
    if prompt == "-":
        prompt = sys.stdin.read()
    from mmm_export import chat
    from mmm_export.runtime import GenerationOptions, Session

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    options = GenerationOptions(**{name: rest[name] for name in names})
    with Session.open(
        bundle,
        providers=list(rest["providers"]) or None,
        chunk_tokens=rest["chunk_tokens"],
        threads=rest["threads"],
        check_content=not rest["no_check"],
        kernels=rest["kernels"],
    ) as session:
        if rest["load_state"]:
            session.load_state(rest["load_state"])
        talk = chat.Conversation(session, options, images=rest["images"], max_tiles=rest["max_tiles"])
        if prompt is not None:
            talk.ask(prompt)
        failed = interactive and not chat.converse(talk)
        if rest["save_state"]:
            session.save_state(rest["save_state"])
    return 1 if failed else 0


@cli.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in a checkpoint, a bundle or a state file.

    Dimensions, layer kinds, parameters, bytes of state for each sequence, files, and what is odd about a checkpoint.
    Reads no weights and needs no torch.

    \b
    Example:
      mmm-export inspect mmMamba-hybrid
    """
    from mmm_export import rendering
    from mmm_export.inspection import inspect as inspection_of

    data = inspection_of(path)
    click.echo(_json(data) if as_json else rendering.inspection(data))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has for each step, and how to get what it lacks.

    \b
    Example:
      mmm-export doctor
    """
    from mmm_export import rendering
    from mmm_export.doctor import examine, to_json

    found = examine()
    click.echo(_json(to_json(found)) if as_json else rendering.findings(found))


@cli.group()
def plugins() -> None:
    """Build the kernels and the libraries that carry them into TensorRT and ONNX Runtime.

    \b
    Example:
      mmm-export plugins build
    """


@plugins.command(name="build")
@click.option(
    "--cuda-arch",
    default="native",
    metavar="ARCH,..",
    help="GPU architectures: 87 or orin, 90 or hopper, ..; native asks the driver; none builds for the CPU alone.",
)
@click.option("--cross", type=click.Choice(["aarch64"]), help="Compile for a Jetson's processor on another machine.")
@click.option("--out", type=PATH, metavar="DIR", show_default="the cache", help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace DIR if it holds a build already.")
@click.option("--only", metavar="TARGET,..", help="kernels, tensorrt, onnxruntime, mini-host.")
@click.option("--tensorrt-include", type=PATH, metavar="DIR", help="Folder of NvInfer.h.")
@click.option("--onnxruntime-include", type=PATH, metavar="DIR", help="Folder of onnxruntime_c_api.h.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", show_default="all cores", help="Compilers at a time.")
def build_libraries(cuda_arch: str, only: str | None, **rest: Any) -> None:
    """Compile the kernels and their libraries for TensorRT and ONNX Runtime.

    Needs cmake, a C++ compiler and, for a GPU, nvcc. A library whose headers are missing is left out with a note. The result
    lies in a cache, where `run` and `verify` find it, or in DIR.

    \b
    Examples:
      mmm-export plugins build
      mmm-export plugins build --cuda-arch orin --cross aarch64 --out build/orin
    """
    from mmm_export import rendering
    from mmm_export.plugins.architectures import parse_architectures
    from mmm_export.plugins.build import BuildOptions, build_plugins, parse_targets
    from mmm_export.progress import console_progress

    options = BuildOptions(
        architectures=parse_architectures(cuda_arch), only=parse_targets(only) if only is not None else None, **rest
    )
    click.echo(rendering.plugin_build(build_plugins(options, progress=console_progress())))


@cli.command()
@click.option("-o", "--output", type=PATH, default="demo-output", metavar="DIR", help="Folder to write.")
def demo(output: Path) -> None:
    """Run the whole flow on a tiny random model and a photograph, in about a minute.

    Writes a checkpoint, exports it, verifies the bundle, and asks it about a picture. The weights are random, so the
    answer is nonsense; everything else is as with a trained model.

    \b
    Example:
      mmm-export demo --output demo-output
    """
    require("export")
    require("demo")
    from mmm_export.demo import run_demo

    run_demo(output, lambda arguments: run(cli, arguments))


def _json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)


def main() -> None:
    """Run the program; see `mmm_export.command_line` for its exit codes."""
    sys.exit(run(cli, sys.argv[1:]))


if __name__ == "__main__":
    main()
