"""`mmm-export run`: questions about text and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mmm_export.commands.options import PATH, inference_options


@click.command(name="run")
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
def run_bundle(bundle: Path, prompt: str | None, interactive: bool, **rest: Any) -> int:
    """Answer a prompt about text and images with a BUNDLE or an engine, or converse.

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
    return 1 if failed else 0
