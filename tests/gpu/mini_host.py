"""Calls of the mini host on tensors: inputs as .npy files, options, outputs; needs neither onnx nor ml_dtypes.

MMM_TENSORRT_PLUGIN_DIR names the folder of libmmm_tensorrt.so and mmm_mini_host. As a program it writes small cases for the
sanitizers, one folder each, with `in`, `out` and the file `options`:

    PYTHONPATH=src python tests/gpu/mini_host.py FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.inputs import EPS, Inputs, Sizes, draw
from gpu.kernels import DEVICE
from gpu.reference import Result

FOLDER_VARIABLE = "MMM_TENSORRT_PLUGIN_DIR"
NAMES = (
    *("projected", "lengths", "conv_state", "ssm_state"),
    *("conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight"),
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# One call of each kernel at its own sizes, and at the edges: a head's rows over several blocks, padding, no tokens.
SANITIZED: dict[str, tuple[Sizes, torch.dtype, list[int] | None]] = {
    "step-bf16": (Sizes(1, 1), BF16, None),
    "step-fp32-batch": (Sizes(8, 1), FP32, [1, 0, 1, 1, 1, 1, 1, 1]),
    "step-64": (Sizes(2, 1, 4, 2, 64, 64, 4), FP16, None),
    "sequential-fp32": (Sizes(1, 5), FP32, None),
    "sequential-fp32-batch": (Sizes(9, 35), FP32, [35, 0, 1, 16, 17, 31, 32, 33, 34]),
    "sequential-odd": (Sizes(2, 19, 6, 2, 48, 32, 3), BF16, [19, 3]),
    "chunked-bf16": (Sizes(1, 193), BF16, None),
    "chunked-fp16-64": (Sizes(2, 130, 4, 2, 64, 64, 4), FP16, [130, 65]),
    "nothing": (Sizes(2, 0), BF16, None),
}


def array_of(tensor: torch.Tensor) -> Any:
    """Copy to host memory; bfloat16 as its bits, which the mini host takes with --bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == BF16 else tensor.numpy()


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Write NAME.npy for every input into `folder`/in, and make `folder`/out."""
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True)
    lengths = inputs.lengths
    if lengths is None:
        lengths = torch.full((inputs.sizes.batch,), inputs.sizes.tokens, dtype=torch.int32)
    for name in NAMES:
        np.save(folder / "in" / f"{name}.npy", array_of(lengths if name == "lengths" else getattr(inputs, name)))


def options_of(inputs: Inputs) -> list[str]:
    """Options that give the attributes of the node."""
    sizes = {name: f"int32:{getattr(inputs.sizes, name)}" for name in ("heads", "kv_heads", "head_dim", "state_dim")}
    sizes |= {"eps": f"float32:{EPS!r}", "plugin_version": "char:1"}
    fields = [word for name, value in sizes.items() for word in ("--field", f"{name}={value}")]
    return [*fields, *(["--bfloat16"] if inputs.projected.dtype == BF16 else [])]


def run_host(folder: Path, inputs: Inputs, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the mini host on `inputs`."""
    write_inputs(folder, inputs)
    build = Path(os.environ[FOLDER_VARIABLE])
    command: list[str | Path] = [build / "mmm_mini_host", build / "libmmm_tensorrt.so", "--device", DEVICE, *options]
    command += [*options_of(inputs), "--inputs", folder / "in", "--outputs", folder / "out"]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)


def read_outputs(folder: Path, inputs: Inputs) -> Result:
    """Read what `run_host` wrote, onto the device of the inputs."""

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        array = np.load(folder / "out" / f"{name}.npy")
        tensor = torch.from_numpy(array.view(np.int16) if dtype == BF16 else array).to(inputs.projected.device)
        return tensor.view(dtype) if dtype == BF16 else tensor

    io = inputs.projected.dtype
    return Result(read("y", io), read("conv_state_out", io), read("ssm_state_out", inputs.ssm_state.dtype))


def main() -> None:
    for name, (sizes, io, lengths) in SANITIZED.items():
        inputs = draw(sizes, io, lengths=lengths, device="cpu")
        write_inputs(Path(sys.argv[1]) / name, inputs)
        (Path(sys.argv[1]) / name / "options").write_text(" ".join(options_of(inputs)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
