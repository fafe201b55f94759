"""What the documents say exists, and they say it in the words of the project."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mmm_export.cli import cli

ROOT = Path(__file__).resolve().parents[2]
SELF = Path(__file__).resolve()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

# Words that the glossary replaces by: checkpoint, bundle, prefill, decode step, timing cache, Q/DQ pair, state pool.
FORBIDDEN_WORDS = (
    "artifact",
    "artefact",
    "model file",
    "context phase",
    "generation phase",
    "calibration cache",
    "fake quant",
    "cache manager",
)
# Folders of one machine, and names of package registries: neither belongs into a repository.
FORBIDDEN_PLACES = (
    r"(?<![\w.])/(?:root|home|work|Users)/\w",
    r"pypi\.org",
    r"pythonhosted",
    r"huggingface\.co",
    r"://download\.",
)


def texts() -> list[Path]:
    """All text files of the repository but this one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ""}
    return [
        path for path in paths if path.is_file() and path.suffix in kinds and path != SELF and path.name != "LICENSE"
    ]


def code_lines(document: Path) -> list[str]:
    """Lines of the shell blocks of a document, and its inline code, without comments."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:mmm-export|make|python) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in (*lines, *inline)]


def commands(program: str) -> list[tuple[str, list[str]]]:
    found = []
    for document in DOCUMENTS:
        for line in code_lines(document):
            for part in re.split(r"&&|\||;", line):
                words = shlex.split(part.replace("...", ""))
                if words and words[0] == program:
                    found.append((f"{document.name}: {part.strip()}", words[1:]))
    return found


def test_every_command_in_a_document_exists_with_its_options() -> None:
    found = commands("mmm-export")
    assert len(found) > 5
    for where, words in found:
        words = [word for word in words if word not in ("--verbose", "--help", "--version")]
        if not words or words[0] == "COMMAND":
            continue
        assert words[0] in cli.commands, where
        command = cli.commands[words[0]]
        if isinstance(command, click.Group):
            words = words[1:]
            if not words:
                continue
            assert words[0] in command.commands, where
            command = command.commands[words[0]]
        known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
        assert {word for word in words[1:] if word.startswith("-") and word != "-"} <= known, where


def test_every_make_target_in_a_document_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = commands("make")
    assert found
    for where, words in found:
        assert {word for word in words if "=" not in word} <= targets, where


def test_every_script_in_a_document_exists() -> None:
    found = commands("python")
    assert found
    for where, words in found:
        if words and words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), where


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "exec make test"
    assert "make test" in "\n".join(code_lines(ROOT / "README.md"))
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"help", "check", "test", "test-full", "demo", "format"} <= {line.split()[0] for line in shown.splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    document = ROOT / name
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in slugs, link


def test_python_examples_in_documents_compile() -> None:
    blocks = [
        (path.name, block)
        for path in DOCUMENTS
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert blocks
    for name, block in blocks:
        compile(block, name, "exec")


def test_only_words_of_the_glossary_are_used() -> None:
    for path in texts():
        text = path.read_text(encoding="utf-8").lower()
        assert [word for word in FORBIDDEN_WORDS if re.search(rf"\b{word}", text)] == [], path


def test_no_machine_folder_and_no_registry_is_named() -> None:
    checked = texts()
    assert len(checked) > 50
    for path in checked:
        text = path.read_text(encoding="utf-8")
        assert [match for pattern in FORBIDDEN_PLACES for match in re.findall(pattern, text)] == [], path


def test_figures_in_documents_are_those_of_the_result_files() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
