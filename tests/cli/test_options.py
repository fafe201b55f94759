"""The command line repeats defaults and choices of the stages, since help imports none: here they are held equal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args, get_type_hints

import click

from mmm_export.bench.measurement import BenchOptions, lengths_from_text
from mmm_export.cli import cli
from mmm_export.exporter.bundle import ExportOptions
from mmm_export.exporter.verify import VerifyOptions
from mmm_export.packages import EXTRAS
from mmm_export.runtime import GenerationOptions
from mmm_export.runtime.opening import CUDA_CHUNK_TOKENS, DEFAULT_CHUNK_TOKENS


def parsed(command: str, *arguments: str) -> dict[str, Any]:
    """Return what a command is called with when no option is given."""
    return cli.commands[command].make_context(command, list(arguments)).params


def defaults(options: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(options)}


def told_chunk_tokens(command: str, *arguments: str) -> list[int]:
    """Return the sizes that the help of --chunk-tokens tells; the option itself leaves the choice to the session."""
    option = next(p for p in cli.commands[command].params if p.name == "chunk_tokens")
    assert isinstance(option, click.Option)
    assert parsed(command, *arguments)["chunk_tokens"] is None
    return [int(number) for number in re.findall(r"\d+", str(option.show_default))]


def test_export_options_agree() -> None:
    found = parsed("onnx", "checkpoint", "-o", "bundle")
    assert {name: found.get(name) for name in defaults(ExportOptions)} == defaults(ExportOptions)
    hints = get_type_hints(ExportOptions)
    choices = {p.name: p.type.choices for p in cli.commands["onnx"].params if isinstance(p.type, click.Choice)}
    assert choices
    for name, offered in choices.items():
        assert tuple(offered) == get_args(hints[str(name)]), name


def test_verify_options_agree() -> None:
    found = parsed("verify", "bundle", "--checkpoint", "checkpoint")
    for name in ("prompt", "images", "new_tokens"):
        assert found[name] == defaults(VerifyOptions)[name], name


def test_generation_options_agree() -> None:
    found = parsed("run", "bundle", "--prompt", "x")
    wanted = defaults(GenerationOptions)
    del wanted["stop_ids"]  # ids are for scripts; the command line has --stop TEXT
    assert {name: found[name] for name in wanted} == wanted
    assert told_chunk_tokens("run", "bundle", "--prompt", "x") == [DEFAULT_CHUNK_TOKENS, CUDA_CHUNK_TOKENS]


def test_bench_options_agree() -> None:
    found = parsed("bench", "bundle")
    wanted = defaults(BenchOptions)
    assert lengths_from_text(found["lengths"]) == wanted["lengths"]
    assert {name: found[name] for name in ("new_tokens", "repeats", "budget_s")} == {
        name: wanted[name] for name in ("new_tokens", "repeats", "budget_s")
    }
    assert told_chunk_tokens("bench", "bundle") == [DEFAULT_CHUNK_TOKENS, CUDA_CHUNK_TOKENS]


def test_packages_of_the_extras_are_importable_names() -> None:
    from importlib.util import find_spec

    assert [name for name in EXTRAS["export"] if find_spec(name) is None] == []
