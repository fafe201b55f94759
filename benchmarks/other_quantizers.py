"""Other people's quantizers on the decoder graph of a bundle and on the prompts that ours is calibrated on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from calibration_calls import Calls
from quantized_models import Questions

ORT_METHODS = ("MinMax", "Percentile", "Entropy")
# Formats and calibration methods of nvidia-modelopt, as its command line names them.
MODELOPT = (("int8", "max"), ("int8", "entropy"), ("fp8", "max"), ("int4", "awq_clip"), ("int4", "rtn_dq"))


def save_calls(asked: Questions, file: Path) -> Path:
    """Write prompts with their answers, without the end of the turn, as `Calls` reads them."""
    rows = []
    for embeds, length, answer, said in zip(
        asked.embeds, asked.lengths, asked.answers, asked.answer_embeds, strict=True
    ):
        rows.append(np.concatenate([embeds[:length], said[: int((answer >= 0).sum()) - 1]]))
    np.savez(file, embeds=np.concatenate(rows), lengths=np.array([len(row) for row in rows]))
    return file


@dataclass(frozen=True)
class Others:
    """Which quantizers to run.

    Attributes:
        modelopt: the Python of an environment with nvidia-modelopt; its packages exclude ours, so it is another than this one.
    """

    modelopt: Path | None = None

    def graphs(self, graph: Path, calls: Path, work: Path) -> Iterator[tuple[str, str, Path]]:
        """Quantize one decoder by each; yield who did it, its format and the quantized graph."""
        for method in ORT_METHODS:
            yield f"onnxruntime static, {method}", "int8", ort_static(graph, calls, work, method)
        if self.modelopt is None:
            return
        plain = work / "inlined.onnx"  # it loses the scan's function otherwise, in some of its modes
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(graph)), plain)
        for form, method in MODELOPT:
            target = work / f"modelopt-{form}-{method}.onnx"
            script = Path(__file__).with_name("modelopt_quantize.py")
            command = [str(self.modelopt), str(script), str(plain), str(calls), str(target), form, method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(f"nvidia-modelopt, {form}, {method}: {done.stderr[-2000:]}\n")
                continue
            yield f"{done.stdout.splitlines()[-1]}, {method}", form, target


def ort_static(graph: Path, calls: Path, work: Path, method: str) -> Path:
    """Quantize a decoder with ONNX Runtime's own static quantizer: int8, by column, symmetric, Q/DQ."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    target = work / f"static-{method}.onnx"
    quantize_static(
        graph,
        target,
        Calls(graph, calls, by_token=method != "MinMax"),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
    )
    return target
