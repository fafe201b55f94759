"""ONNX models of MmmSelectiveScan nodes, written without the onnx package, which a GPU machine need not have."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from gpu.inputs import EPS, Inputs

ELEMENT_TYPES = {torch.float32: 1, torch.int32: 6, torch.float16: 10, torch.bfloat16: 16}
WEIGHTS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight")
_FLOAT, _INT, _STRING = 1, 2, 3  # of AttributeProto.AttributeType
_OPSET, _IR_VERSION = 20, 10


def node_model(inputs: Inputs, nodes: int = 1) -> bytes:
    """Serialize a graph of nodes that all read `projected` and `lengths`; the weights are constants.

    Node i has the inputs conv_state.i and ssm_state.i and the outputs y.i, conv_state_out.i and ssm_state_out.i.
    """
    s, io = inputs.sizes, ELEMENT_TYPES[inputs.projected.dtype]
    conv, ssm = ("B", s.channels, s.conv_width - 1), ("B", s.heads, s.head_dim, s.state_dim)
    sizes = {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim, "state_dim": s.state_dim}
    attributes = [_integer(name, value) for name, value in sizes.items()]
    attributes += [_number("eps", EPS), _text("plugin_version", "1")]
    graph = b""
    taken = [_value("projected", io, ("B", "T", s.width)), _value("lengths", ELEMENT_TYPES[torch.int32], ("B",))]
    given = []
    for i in range(nodes):
        reads = ["projected", "lengths", f"conv_state.{i}", f"ssm_state.{i}", *WEIGHTS]
        writes = [f"y.{i}", f"conv_state_out.{i}", f"ssm_state_out.{i}"]
        node = b"".join(_field(1, name) for name in reads) + b"".join(_field(2, name) for name in writes)
        node += _field(3, f"scan.{i}") + _field(4, "MmmSelectiveScan") + _field(7, "mmm")
        graph += _field(1, node + b"".join(_field(5, attribute) for attribute in attributes))
        taken += [_value(reads[2], io, conv), _value(reads[3], ELEMENT_TYPES[torch.float32], ssm)]
        given += [
            _value(writes[0], io, ("B", "T", s.heads * s.head_dim)),
            _value(writes[1], io, conv),
            _value(writes[2], ELEMENT_TYPES[torch.float32], ssm),
        ]
    graph += _field(2, "scans") + b"".join(_field(5, _constant(name, getattr(inputs, name))) for name in WEIGHTS)
    graph += b"".join(_field(11, value) for value in taken) + b"".join(_field(12, value) for value in given)
    opsets = [_field(1, domain) + _number_field(2, version) for domain, version in (("", _OPSET), ("mmm", 1))]
    return _number_field(1, _IR_VERSION) + _field(7, graph) + b"".join(_field(8, opset) for opset in opsets)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _field(number: int, content: bytes | str) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _integer(name: str, value: int) -> bytes:
    return _field(1, name) + _number_field(3, value) + _number_field(20, _INT)


def _number(name: str, value: float) -> bytes:
    return _field(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number_field(20, _FLOAT)


def _text(name: str, value: str) -> bytes:
    return _field(1, name) + _field(4, value) + _number_field(20, _STRING)


def _value(name: str, element_type: int, shape: Sequence[int | str]) -> bytes:
    dims = [_field(2, size) if isinstance(size, str) else _number_field(1, size) for size in shape]
    tensor = _number_field(1, element_type) + _field(2, b"".join(_field(1, dim) for dim in dims))
    return _field(1, name) + _field(2, _field(1, tensor))


def _constant(name: str, tensor: torch.Tensor) -> bytes:
    dims = b"".join(_number_field(1, size) for size in tensor.shape)
    raw = tensor.detach().cpu().contiguous().numpy().tobytes()
    return dims + _number_field(2, ELEMENT_TYPES[tensor.dtype]) + _field(8, name) + _field(9, raw)
