"""Drives `runtime/tensorrt/library.py` with genuine bindings, as far as they go without a GPU; a script for a Python that has them.

Arguments: the bindings' module, the flavor, a plugin library, and a folder for files. Prints JSON: what each step said.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from mmm_export.errors import MmmError


def main() -> None:
    bindings, flavor, plugin, folder = sys.argv[1:]
    # The front packages are not on the shelves; they only forward to these.
    sys.modules["tensorrt" if flavor == "tensorrt" else "tensorrt_rtx"] = importlib.import_module(bindings)
    from mmm_export.runtime.tensorrt.library import TensorRT

    libraries = [TensorRT(flavor), TensorRT(flavor)]  # type: ignore[arg-type]
    told = {"version": libraries[0].version, "start": _said(libraries[0].start)}
    if told["start"] == "ok":
        told["plugin"] = _said(lambda: libraries[0].load_plugins(Path(plugin)))
        libraries[1].start()
        told["plugin of another session"] = _said(lambda: libraries[1].load_plugins(Path(plugin)))
        nonsense = Path(folder) / "nonsense.so"
        nonsense.write_bytes(b"no library")
        told["nonsense plugin"] = _said(lambda: libraries[0].load_plugins(nonsense))
        libraries[0].allow_embedded_plugins()
        plan = Path(folder) / "nonsense.plan"
        plan.write_bytes(b"no plan" * 100)
        told["nonsense plan"] = _said(lambda: libraries[0].load(plan))
    for library in libraries:
        library.close()
    print(json.dumps(told))


def _said(step: Callable[[], object]) -> str:
    try:
        step()
    except MmmError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


if __name__ == "__main__":
    main()
