"""Help is instant: it loads nothing but click."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

# What a stage needs and help does not.
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "rich", "PIL", "sentencepiece", "safetensors")
HELP_LIMIT_S = 0.3  # below this an answer feels immediate; half of it is Python's own start
PROBE = """
import sys
from mmm_export.cli import cli
from mmm_export.command_line import run
code = run(cli, sys.argv[1:])
print(sorted(name for name in sys.modules if "." not in name), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["onnx", "--help"], ["run", "--help"], ["--version"], ["ispect"]])
def test_help_and_usage_errors_load_only_click(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    loaded = done.stderr.splitlines()[-1]
    assert "'click'" in loaded
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):  # the best of five: the machine may be busy with other tests
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmm_export", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    assert min(times) < HELP_LIMIT_S


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_inspect_and_doctor_load_no_torch(command: str) -> None:
    arguments = {"inspect": ["inspect", "nowhere"], "doctor": ["doctor", "--json"]}[command]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert "'torch'" not in done.stderr.splitlines()[-1]
