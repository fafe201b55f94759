"""Environment variables that a bundle needs while its graphs are loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mmm_export.errors import BundleError

# ONNX Runtime reads this one whenever it opens a graph: "0" lets it open opsets that its release does not know as final yet.
# Anything else in a manifest is refused, since a bundle is data and not a program.
KNOWN_VARIABLES = ("ALLOW_RELEASED_ONNX_OPSET_ONLY",)

_lock = threading.Lock()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for the time of the block, then put back what was there; one thread at a time.

    Raises:
        BundleError: a variable that no bundle has a reason to set.
    """
    unknown = sorted(set(variables) - set(KNOWN_VARIABLES))
    if unknown:
        raise BundleError(
            "the bundle asks for an environment variable that this version does not know",
            found=", ".join(unknown),
            wanted=" or ".join(KNOWN_VARIABLES),
            hint="upgrade mmm-export",
        )
    with _lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
