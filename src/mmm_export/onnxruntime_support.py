"""What the installed ONNX Runtime can do."""

from __future__ import annotations

import re
from typing import Literal

LINEAR_ATTENTION_SINCE = (1, 26)


def has_linear_attention() -> bool:
    """Whether bundles exported with `--body linear-attention` run here. The operator is younger than Python 3.10's newest build."""
    import onnxruntime

    return version_tuple(onnxruntime.__version__) >= LINEAR_ATTENTION_SINCE


def best_body() -> Literal["linear-attention", "standard"]:
    """The body of the scan that runs here, the faster one if both do."""
    return "linear-attention" if has_linear_attention() else "standard"


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.26.0rc1" gives (1, 26, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
