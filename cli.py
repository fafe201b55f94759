"""The command `mmm-export`: its commands, in the order of the flow. Each lies in a file of `mmm_export.commands`."""

from __future__ import annotations

import sys

import click

from mmm_export import __version__
from mmm_export.command_line import PROGRAM, FlowGroup, run
from mmm_export.commands.bench import bench
from mmm_export.commands.calibrate import calibrate
from mmm_export.commands.demo import demo
from mmm_export.commands.digits import digits
from mmm_export.commands.distill import distill
from mmm_export.commands.doctor import doctor
from mmm_export.commands.evaluate import evaluate
from mmm_export.commands.inspect import inspect
from mmm_export.commands.onnx import onnx
from mmm_export.commands.plugins import plugins
from mmm_export.commands.run import run_bundle
from mmm_export.commands.trt import trt
from mmm_export.commands.verify import verify

EPILOG = f"""\b
The flow, from a checkpoint to text:
  {PROGRAM} onnx CHECKPOINT -o BUNDLE               export to ONNX
  {PROGRAM} verify BUNDLE --checkpoint CHECKPOINT   prove that it computes the same
  {PROGRAM} run BUNDLE --prompt TEXT --image FILE   ask it something
Each command explains itself: {PROGRAM} COMMAND --help"""

COMMANDS: tuple[click.Command, ...] = (
    distill,
    onnx,
    verify,
    calibrate,
    trt,
    run_bundle,
    evaluate,
    bench,
    inspect,
    doctor,
    plugins,
    digits,
    demo,
)


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


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the program; see `mmm_export.command_line` for its exit codes."""
    sys.exit(run(cli, sys.argv[1:]))


if __name__ == "__main__":
    main()
