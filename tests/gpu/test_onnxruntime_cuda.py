"""The operator library inside ONNX Runtime's CUDA provider: float64's numbers, with CUDA graphs and with states in place.

MMM_ONNXRUNTIME_LIBRARY names the library; without it the newest build of the plugin cache is taken. With MMM_KERNEL_DEVICE=cpu
the same tests run in the CPU provider, but for the graphs.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.bounds import BOUND, EXACT_BOUND, relative_l2
from gpu.inputs import Inputs, Sizes, draw
from gpu.kernels import DEVICE
from gpu.node_model import ELEMENT_TYPES, node_model
from gpu.reference import Result, mixer
from mmm_export.plugin_files import find_library

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = pytest.mark.parametrize("io", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
PROVIDER = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[DEVICE]
GRAPH = pytest.mark.parametrize("graph", [False, True] if DEVICE == "cuda" else [False], ids=lambda on: f"graph={on}")
NODES = 32


@pytest.fixture(scope="module")
def library() -> Path:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    onnxruntime = pytest.importorskip("onnxruntime")  # after torch, whose CUDA libraries it then finds
    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider: install onnxruntime-gpu")
    named = os.environ.get("MMM_ONNXRUNTIME_LIBRARY")
    found = Path(named) if named else find_library("onnxruntime", cuda=DEVICE == "cuda")
    if found is None:
        pytest.skip("no library: build it (mmm-export plugins build) or name it in MMM_ONNXRUNTIME_LIBRARY")
    return found


class Net:
    """A session on `nodes` nodes with bound buffers; `in_place` binds one buffer to each SSM state before and after."""

    def __init__(
        self, library: Path, inputs: Inputs, *, nodes: int = 1, graph: bool = False, in_place: bool = True
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library))
        own = {"enable_cuda_graph": str(int(graph))} if DEVICE == "cuda" else {}
        self.session = onnxruntime.InferenceSession(node_model(inputs, nodes), options, providers=[(PROVIDER, own)])
        assert self.session.get_providers()[0] == PROVIDER, "the CUDA provider could not be loaded"
        self.start = inputs
        self.run_options = onnxruntime.RunOptions()
        if graph:
            self.run_options.add_run_config_entry("gpu_graph_id", "1")
        sizes = inputs.sizes
        full = torch.full((sizes.batch,), sizes.tokens, dtype=torch.int32, device=DEVICE)
        self.projected, self.lengths = inputs.projected.clone(), full if inputs.lengths is None else inputs.lengths
        self.conv = [inputs.conv_state.clone() for _ in range(nodes)]
        self.conv_out = [torch.full_like(inputs.conv_state, float("nan")) for _ in range(nodes)]
        self.ssm = [inputs.ssm_state.clone() for _ in range(nodes)]
        self.ssm_out = self.ssm if in_place else [torch.full_like(inputs.ssm_state, float("nan")) for _ in range(nodes)]
        shape = (sizes.batch, sizes.tokens, sizes.heads * sizes.head_dim)
        self.y = [torch.full(shape, float("nan"), dtype=inputs.projected.dtype, device=DEVICE) for _ in range(nodes)]
        self.binding = self.session.io_binding()
        self._bind(self.binding.bind_input, "projected", self.projected)
        self._bind(self.binding.bind_input, "lengths", self.lengths)
        for i in range(nodes):
            self._bind(self.binding.bind_input, f"conv_state.{i}", self.conv[i])
            self._bind(self.binding.bind_input, f"ssm_state.{i}", self.ssm[i])
            self._bind(self.binding.bind_output, f"y.{i}", self.y[i])
            self._bind(self.binding.bind_output, f"conv_state_out.{i}", self.conv_out[i])
            self._bind(self.binding.bind_output, f"ssm_state_out.{i}", self.ssm_out[i])
        synchronize()

    @staticmethod
    def _bind(bind: Any, name: str, tensor: torch.Tensor) -> None:
        bind(name, DEVICE, 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding, self.run_options)
        synchronize()

    def run_from_the_start(self) -> None:
        """Run once from the given states. A session's first run with a CUDA graph runs more than once: it warms up."""
        self.run()
        for buffers, value in ((self.conv, self.start.conv_state), (self.ssm, self.start.ssm_state)):
            for buffer in buffers:
                buffer.copy_(value)
        for buffer in self.y:
            buffer.fill_(float("nan"))
        synchronize()
        self.run()

    def result(self, node: int = 0) -> Result:
        return Result(self.y[node], self.conv_out[node], self.ssm_out[node])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def assert_close(found: Result, inputs: Inputs) -> None:
    """Hold a result against float64 with operands as they are and as matrix units take them; bounds.py gives the reasons."""
    io = inputs.projected.dtype
    exact = mixer(inputs)
    rounded = exact if io == FP32 else mixer(inputs, operands=io)
    assert relative_l2(found.y, exact.y) <= EXACT_BOUND[io]
    assert min(relative_l2(found.y, right.y) for right in (exact, rounded)) <= BOUND[io]
    assert min(relative_l2(found.ssm_state, right.ssm_state) for right in (exact, rounded)) <= BOUND[io]
    assert torch.equal(found.conv_state, exact.conv_state)


@TYPES
@GRAPH
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in-place"])
@pytest.mark.parametrize("tokens", [1, 65, 1025])
def test_a_node_computes_what_float64_computes(
    library: Path, tokens: int, in_place: bool, graph: bool, io: torch.dtype
) -> None:
    inputs = draw(Sizes(1, tokens), io, seed=tokens)
    net = Net(library, inputs, graph=graph, in_place=in_place)
    net.run_from_the_start()
    assert_close(net.result(), inputs)


@TYPES
@GRAPH
def test_rows_of_a_batch_end_where_lengths_says(library: Path, graph: bool, io: torch.dtype) -> None:
    inputs = draw(Sizes(3, 70), io, lengths=[70, 0, 33])
    net = Net(library, inputs, graph=graph)
    net.run_from_the_start()
    assert_close(net.result(), inputs)


@GRAPH
def test_steps_carry_the_state_on_in_place(library: Path, graph: bool) -> None:
    inputs = draw(Sizes(2, 1), FP32)
    net = Net(library, inputs, graph=graph)
    net.run_from_the_start()
    for _ in range(5):
        inputs = inputs.starting_from(net.conv[0].clone(), net.ssm[0].clone())
        synchronize()  # ONNX Runtime's stream does not wait for the copies, and is about to change what they read
        net.run()
        assert_close(net.result(), inputs)


def test_a_long_call_after_short_ones_gets_its_workspace(library: Path) -> None:
    import onnxruntime

    # One session, lengths that grow and shrink: the provider's arena gives each call what it needs.
    inputs = draw(Sizes(1, 1025), FP16)
    net = Net(library, inputs, in_place=False)
    for tokens in (1, 200, 1025, 64, 1025):
        part = inputs.tokens(0, tokens)
        feeds = {
            "projected": part.projected.contiguous(),
            "lengths": torch.full((1,), tokens, dtype=torch.int32, device=DEVICE),
            "conv_state.0": part.conv_state,
            "ssm_state.0": part.ssm_state,
        }
        outputs = session_outputs(onnxruntime, net, feeds)
        right = mixer(part)
        assert relative_l2(torch.from_numpy(outputs["y.0"]), right.y.cpu()) <= EXACT_BOUND[FP16]
        assert relative_l2(torch.from_numpy(outputs["ssm_state_out.0"]), right.ssm_state.cpu()) <= BOUND[FP16]


def session_outputs(onnxruntime: Any, net: Net, feeds: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Feed host arrays, as most programs do; ONNX Runtime copies."""
    names = [node.name for node in net.session.get_outputs()]
    found = net.session.run(names, {name: tensor.cpu().numpy() for name, tensor in feeds.items()})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("tokens", [1, 65])
def test_a_conv_state_bound_in_place_is_refused(library: Path, tokens: int) -> None:
    net = Net(library, draw(Sizes(1, tokens), BF16))
    net._bind(net.binding.bind_output, "conv_state_out.0", net.conv[0])
    with pytest.raises(Exception, match=r"MmmSelectiveScan: conv_state_out.* conv_state"):
        net.run()


@GRAPH
def test_the_time_of_a_node_is_told(library: Path, graph: bool, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(library, draw(Sizes(), BF16), nodes=NODES, graph=graph)
    for _ in range(5):
        net.run()
    whole = [_seconds(net.run) for _ in range(200 if DEVICE == "cuda" else 3)]
    text = (
        f"{NODES} nodes, T=1, bf16, graph={graph}: {statistics.median(whole) * 1e6 / NODES:.2f} us a node with the wait"
    )
    if DEVICE == "cuda":
        net.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        host = []
        for _ in range(50):
            host.append(_seconds(lambda: net.session.run_with_iobinding(net.binding, net.run_options)))
            synchronize()  # only afterwards, so that what was timed is the host's part alone
        text += f", {statistics.median(host) * 1e6 / NODES:.2f} us a node on the host"
    with capsys.disabled():
        print(f"\n{text}")  # noqa: T201 - the figure is what this is run for
    assert not net.y[NODES - 1].isnan().any()


def _seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
