"""The models of benchmarks in PyTorch, on a device: a bundle's own weights, or random ones of the same size; what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bundle_weights import StoredWeight, all_weights
from torch import Tensor, nn
from torch.nn import functional as F

from mmm_export import names
from mmm_export.manifest import read_manifest
from mmm_export.model import tensors
from mmm_export.model.decoder import MmMamba
from mmm_export.model.linear import Projection
from mmm_export.model.testing.weights import VECTORS, gain, vector
from mmm_export.model.weights import model_skeleton
from mmm_export.spec import ModelSpec

_TORCH_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}
IMAGE_PATH = ("embedding_model.vision_embeddings.", "embedding_model.pixel_shuffle_proj.")
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_from_bundle(bundle: Path, device: str) -> MmMamba:
    """Build the PyTorch model over the weights of a bundle that is not quantized; its activations have the bundle's type.

    The image path stays without numbers. A projection is a turned view of rows (out, in), as of a checkpoint; gate and up lie one
    behind the other where they were fused.
    """
    manifest = read_manifest(bundle)
    model = model_skeleton(manifest.model, dtype=TORCH_DTYPES[manifest.dtype])
    found: dict[str, Tensor] = {}
    for weight, data in all_weights(bundle, (names.EMBEDDING_FILE, names.DECODER_FILE)):
        found.update(_parameters(weight, data, device))
    for name, old in list(model.named_parameters()):
        if not name.startswith(IMAGE_PATH):
            assert found[name].shape == old.shape, (name, found[name].shape, old.shape)
            set_parameter(model, name, found[name])
    return model.eval()


def _parameters(weight: StoredWeight, data: np.ndarray[Any, Any], device: str) -> dict[str, Tensor]:
    """Name what an initializer holds: one parameter, or those that the fusion turned and joined."""
    whole = torch.from_numpy(np.array(data)).to(device).view(_TORCH_TYPES[weight.onnx_type]).view(weight.shape)
    if not weight.name.endswith(".rows"):
        return {weight.name: whole}
    joined = weight.name.removesuffix(".rows").split(".and.")
    return {name: rows.t() for name, rows in zip(joined, whole.chunk(len(joined)), strict=True)}


def random_model(spec: ModelSpec, dtype: torch.dtype, device: str, seed: int = 0) -> MmMamba:
    """Build a model whose activations keep their magnitude, as `write_checkpoint` does, drawn on the device; no image path."""
    model = model_skeleton(spec, dtype=dtype)
    shapes = tensors.required_shapes(spec)
    generator = torch.Generator(device).manual_seed(seed)
    for name, old in list(model.named_parameters()):
        if name.startswith(IMAGE_PATH):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        is_turned = isinstance(owner, Projection) and old.dim() == 2
        shape = tuple(reversed(old.shape)) if is_turned else tuple(old.shape)
        if name.endswith(VECTORS):
            raw = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
            value = torch.from_numpy(vector(name, shape, raw).reshape(shape)).to(device, dtype)
        else:
            value = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            value *= gain(spec, name, shapes.get(name, shape))
        set_parameter(model, name, value.t() if is_turned else value)
    model.ropes = MmMamba.make_ropes(spec).to(device)
    return model.eval()


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class Mlp:
    """The second half of a layer: norm, gate and up in one product, SiLU, down, residual."""

    norm: Any
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> Mlp:
        """Join gate and up of a `Layer`, whose own weights become views of them."""
        m = layer.feed_forward
        gate_up = torch.cat([m.w1.weight.t(), m.w3.weight.t()])
        m.w1.weight.data, m.w3.weight.data = (part.t() for part in gate_up.chunk(2))
        return cls(layer.ffn_norm, gate_up, m.w2.weight.t())

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(normed(x, self.norm), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def normed(x: Tensor, norm: Any) -> Tensor:
    """RMS norm by PyTorch's own kernel."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
