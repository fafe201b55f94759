"""`mmm-export run`: questions about text and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmm_export.commands.options import PATH, inference_options, max_tiles_option

if TYPE_CHECKING:
    from mmm_export.runtime import GenerationOptions


@click.command(name="run")
@click.argument("bundle", type=PATH)
@click.option("--prompt", metavar="TEXT", help="Question; - reads it from stdin.")
@click.option("--image", "images", type=PATH, multiple=True, metavar="FILE", help="Image to ask about; repeatable.")
@click.option("--interactive", is_flag=True, help="Converse; /help lists what else it takes. Reads a pipe too.")
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help='Answer many: a line {"prompt": "...", "images": ["file", ...]} each, or InternVL\'s conversations.',
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="ROWS",
    show_default="8; 1 for an engine",
    help="Of --prompts, answer so many at once.",
)
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
@max_tiles_option
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1),
    show_default="512, on a CUDA GPU 4096",
    metavar="TOKENS",
    help="Prompt tokens read at once; bounds the memory.",
)
@inference_options
@click.option("--load-state", type=PATH, metavar="FILE", help="Continue a saved conversation.")
@click.option("--save-state", type=PATH, metavar="FILE", help="Save the conversation at the end.")
@click.option(
    "--state-cache",
    type=PATH,
    metavar="DIR",
    help="Keep the states of system text and images there: another question about the same image skips reading it.",
)
@click.option(
    "--state-cache-mib",
    type=click.IntRange(min=1),
    default=2048,
    metavar="MIB",
    help="Bytes of the state cache; what was not used for longest goes first.",
)
@click.option("--no-check", is_flag=True, help="Skip comparing the files with their hashes: starts faster.")
def run_bundle(bundle: Path, prompt: str | None, interactive: bool, prompts: Path | None, **rest: Any) -> int:
    """Answer a prompt about text and images with a BUNDLE or an engine, or converse.

    The answer streams to stdout; speed, token counts and the reason why it ended go to stderr. With --prompts a line of JSON for
    each prompt goes to stdout, in the order of the file; several are answered at once, and the exit code is 1 if some were not.

    \b
    Examples:
      mmm-export run build/bundle --prompt "What is in the picture?" --image photo.jpg
      mmm-export run build/bundle --interactive --save-state talk.state
      mmm-export run build/bundle --prompts prompts.jsonl --batch 16 > answers.jsonl
    """
    if prompts is None and prompt is None and not interactive:
        raise click.UsageError("give --prompt TEXT, --prompts FILE or --interactive")
    if prompts is None and rest["batch"] is not None:
        raise click.UsageError("--batch goes with --prompts FILE")
    for name in ("images", "load_state", "save_state", "state_cache") if prompts is not None else ():
        if rest[name]:
            raise click.UsageError(f"--{name.removesuffix('s').replace('_', '-')} does not go with --prompts FILE")
    if prompts is not None and (prompt is not None or interactive):
        raise click.UsageError("--prompts FILE goes with neither --prompt nor --interactive")
    if prompt == "-":
        prompt = sys.stdin.read()
    from mmm_export.runtime import GenerationOptions

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    options = GenerationOptions(**{name: rest[name] for name in names})
    opening = {
        "providers": list(rest["providers"]) or None,
        "chunk_tokens": rest["chunk_tokens"],
        "threads": rest["threads"],
        "check_content": not rest["no_check"],
        "kernels": rest["kernels"],
    }
    if prompts is not None:
        from mmm_export.prompt_answers import answer_file

        return 0 if answer_file(bundle, prompts, options, rest["batch"], rest["max_tiles"], opening) else 1
    return 0 if _converse(bundle, prompt, interactive, options, rest, opening) else 1


def _converse(
    bundle: Path,
    prompt: str | None,
    interactive: bool,
    options: GenerationOptions,
    rest: dict[str, Any],
    opening: dict[str, Any],
) -> bool:
    """Answer one prompt, or many in a conversation; returns whether everything worked."""
    from mmm_export import chat
    from mmm_export.runtime import Session

    with Session.open(bundle, **opening) as session:
        if rest["state_cache"]:
            session.use_state_cache(
                rest["state_cache"],
                max_bytes=rest["state_cache_mib"] << 20,
                report=lambda text: click.echo(f"warning: {text}", err=True),
            )
        if rest["load_state"]:
            session.load_state(rest["load_state"])
        talk = chat.Conversation(session, options, images=rest["images"], max_tiles=rest["max_tiles"])
        if prompt is not None:
            talk.ask(prompt)
        failed = interactive and not chat.converse(talk)
        if rest["save_state"]:
            session.save_state(rest["save_state"])
    return not failed
