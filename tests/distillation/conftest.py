"""Tests of the distillation can import `toy_task`, which a tiny model learns in seconds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
