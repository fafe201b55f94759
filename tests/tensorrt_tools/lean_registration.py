"""Registers a plugin library in a lean runtime and makes a plugin; a script for a Python that has the bindings.

Argument: the library. Prints JSON: the runtime's version, the creator, and whether good and wrong fields give a plugin.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tensorrt_lean_bindings as trt


def main() -> None:
    registry = trt.get_plugin_registry()
    if registry.load_library(sys.argv[1]) is None:
        raise SystemExit(f"cannot load {sys.argv[1]}")
    creator = registry.get_creator("MmmSelectiveScan", "1", "")

    def makes_plugin(phase: trt.TensorRTPhase, *heads: int) -> bool:
        field = trt.PluginField("heads", np.array(heads, np.int32), trt.PluginFieldType.INT32)
        return creator.create_plugin("layer0", trt.PluginFieldCollection([field]), phase) is not None

    told = {
        "version": trt.__version__,
        "creator": [creator.name, creator.plugin_version, creator.plugin_namespace],
        "fields": [field.name for field in creator.field_names],
        "builds": makes_plugin(trt.TensorRTPhase.BUILD, 16),
        "runs": makes_plugin(trt.TensorRTPhase.RUNTIME, 16),
        "takes_two_heads_entries": makes_plugin(trt.TensorRTPhase.RUNTIME, 16, 8),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
