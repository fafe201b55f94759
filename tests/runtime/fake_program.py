"""mmm-export on a machine with a fake GPU and a fake TensorRT: what scripts/device-check.sh runs in its test.

`verify` and `doctor` are the real commands. `trt` writes an engine of fake plans; `plugins` and `bench` only answer.
FAIL names a command that fails.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def main() -> int:
    command, *rest = sys.argv[1:]
    if os.environ.get("FAIL") == command:
        sys.stderr.write(f"error: {command} was told to fail\n")
        return 1
    if command == "plugins":
        sys.stdout.write("built\n")
        return 0
    if command == "bench":
        Path(rest[rest.index("--json") + 1]).write_text('{"rows": []}')
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    from fake_engine import install, write_engine

    if command == "trt":
        write_engine(Path(rest[0]), Path(rest[rest.index("-o") + 1]))
        return 0
    from mmm_export.cli import cli
    from mmm_export.command_line import run

    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return run(cli, [command, *rest])


if __name__ == "__main__":
    sys.exit(main())
