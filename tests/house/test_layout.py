"""The layout that makes one checkout work as a package, installed, editable, and for every tool."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "mmm_export"
LINKS = {
    "calibration": "../../calibration",
    "cli.py": "../../cli.py",
    "demo_models": "../../demo_models",
    "distillation": "../../distillation",
    "exporter": "../../exporter",
    "model": "../../model",
    "plugins": "../../plugins",
    "runtime": "../../runtime",
}
TOP_LEVEL = {
    *(
        "benchmarks",
        "calibration",
        "demo_models",
        "distillation",
        "docs",
        "exporter",
        "model",
        "plugins",
        "runtime",
        "scripts",
        "src",
        "tests",
    ),
    *("cli.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml"),
}
FILE_LINES = 400  # the alarm of CONTRIBUTING.md
LONG_FILES: dict[str, str] = {}  # path: why it is longer


def tracked_files() -> list[Path]:
    """All files of the repository, or of an unpacked copy of it without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_root_folders_are_seen_in_the_package_through_relative_links() -> None:
    found = {path.name: str(path.readlink()) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert found == LINKS
    for name in LINKS:
        assert (PACKAGE / name).resolve() == ROOT / name


def test_nothing_unexpected_lies_at_the_top() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_no_file_is_longer_than_the_alarm_without_a_reason() -> None:
    sources = [path for path in tracked_files() if path.suffix == ".py" and not path.is_symlink()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES and name not in LONG_FILES} == {}


def test_modules_are_named_for_what_they_hold() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert [path for path in tracked_files() if banned & set(path.relative_to(ROOT).with_suffix("").parts)] == []


# A plain copy of the sources, with one line that must not be there: a check that cannot fail would prove nothing.
VIOLATIONS = {
    "runtime imports torch": ("runtime/context.py", "import torch\n", "The runtime needs no torch"),
    "runtime imports exporter": (
        "runtime/context.py",
        "import mmm_export.exporter.trace\n",
        "Stages meet only through files",
    ),
    "calibration imports runtime": (
        "calibration/__init__.py",
        "import mmm_export.runtime.session\n",
        "Stages meet only through files",
    ),
    "distillation imports exporter": (
        "distillation/stage.py",
        "import mmm_export.exporter.trace\n",
        "Stages meet only through files",
    ),
    "shared code imports a stage": (
        "src/mmm_export/names.py",
        "import mmm_export.model.scan\n",
        "What stages share knows no stage",
    ),
}


def copy_of_sources(folder: Path) -> Path:
    for name in ("src", "calibration", "demo_models", "distillation", "exporter", "model", "plugins", "runtime"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


# The finder of an editable install would answer with the checkout instead of the copy that is to be checked.
LINT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, "src")
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_layers_are_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_breach_of_the_layers_is_seen_through_the_links(tmp_path: Path, name: str) -> None:
    path, line, contract = VIOLATIONS[name]
    copy = copy_of_sources(tmp_path)
    with (copy / path).open("a", encoding="utf-8") as stream:
        stream.write(line)
    done = lint_imports(copy)
    assert done.returncode != 0
    assert re.search(rf"{contract} .*BROKEN", done.stdout), done.stdout


def test_wheel_holds_real_files_under_one_name(tmp_path: Path) -> None:
    # In a process of its own: the build backend works in the current folder.
    script = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    copy = copy_of_sources(tmp_path / "copy")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mmm_export"}
    sources = {
        str(path.relative_to(ROOT / "src"))
        for folder in (PACKAGE, *(PACKAGE / name for name in LINKS if "." not in name))
        for path in folder.rglob("*.py")
    }
    assert sources <= set(names)
    assert "mmm_export/cli.py" in names
    assert "mmm_export/py.typed" in names
    assert "mmm_export/distillation/recipes/mmmamba-linear.yaml" in names
    assert any(name.endswith("LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "mmm-export = mmm_export.cli:main" in archive.read(entry).decode()
