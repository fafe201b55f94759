"""Quantizes a decoder with nvidia-modelopt, in an environment that has it.

python benchmarks/modelopt_quantize.py GRAPH CALLS OUTPUT int8|fp8|int4 METHOD
"""

from __future__ import annotations

import sys
from pathlib import Path

import modelopt
from calibration_calls import Calls
from modelopt.onnx.quantization import quantize


def main() -> int:
    graph, calls, target, form, method = sys.argv[1:]
    quantize(
        graph,
        quantize_mode=form,
        calibration_method=method,
        calibration_data_reader=Calls(Path(graph), Path(calls), by_token=method != "max"),
        calibration_eps=["cpu"],
        op_types_to_quantize=["MatMul"],
        high_precision_dtype="fp32",
        enable_gemv_detection_for_trt=False,  # which would leave the head as it is, and with it what that costs
        output_path=target,
        use_external_data_format=False,
        log_level="WARNING",
    )
    sys.stdout.write(f"\nnvidia-modelopt {modelopt.__version__}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
