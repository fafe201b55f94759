"""The promise about full size: 2.7B parameters exported on a small machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED_BYTES = 13_000_000_000  # 5.5 GB of checkpoint and 5.1 GB of bundle, and some room


@pytest.mark.slow
def test_full_size_export_keeps_its_limits_of_time_and_memory(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
    # The script exits with 1 beyond 150 s or 1.5 GB of anonymous memory.
    script = ROOT / "benchmarks" / "full_size_export.py"
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, script, "--folder", tmp_path, "--results", results], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert results.is_file()
