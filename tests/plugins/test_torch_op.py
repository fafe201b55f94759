"""The PyTorch operators over the kernels, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmm_export.errors import KernelError
from mmm_export.model import scan as model_scan
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.weights import load_model
from mmm_export.plugin_files import CACHE_VARIABLE
from mmm_export.plugins import torch_op
from mmm_export.plugins.library import KernelLibrary

SIZES = model_scan.ScanSizes(heads=4, kv_heads=2, head_dim=16, state_dim=32, eps=1e-5)
CHANNELS = 2 * (16 + 32) + 4 * 32
WIDTH = CHANNELS + 4 * 16 + 4


@pytest.fixture(autouse=True)
def library(kernels: KernelLibrary) -> Iterator[None]:
    torch_op.use_library(kernels)
    yield
    torch_op.use_library(None)


def draw(tokens: int = 9, *, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of a Scan: projected, lengths, both states, weights, sizes."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    weights = model_scan.ScanWeights(normal(CHANNELS, 3), normal(CHANNELS), normal(4) - 3, normal(4), normal(16))
    projected, conv, ssm = normal(2, tokens, WIDTH), normal(2, CHANNELS, 2), normal(2, 4, 16, 32)
    wide = torch.promote_types(dtype, torch.float32)
    lengths = torch.tensor([tokens, tokens // 2])
    return [projected.to(dtype), lengths, conv.to(dtype), ssm.to(wide), weights, SIZES]


def operands(drawn: list[Any]) -> tuple[Any, ...]:
    """The same as arguments of the operators."""
    projected, lengths, conv, ssm, weights, sizes = drawn
    return (projected, lengths.int(), conv, ssm, *vars(weights).values(), sizes.kv_heads, sizes.eps)


# fp64: eps is a float32 in the interface, off by 2.5e-9 of itself. fp32: sums of 32 in another order. fp16, bf16: both forms
# compute in float32 and round y once, so that they differ by one unit in the last place where they differ.
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float64, 1e-8, 1e-9),
        (torch.float32, 1e-4, 1e-5),
        (torch.float16, 2**-10, 1e-4),
        (torch.bfloat16, 2**-7, 1e-3),
    ],
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_operator_computes_what_the_model_does(dtype: torch.dtype, rtol: float, atol: float, tokens: int) -> None:
    drawn = draw(tokens, dtype=dtype)
    found, wanted = torch_op.scan(*drawn), model_scan.sequential(*drawn)
    for row, length in enumerate(drawn[1].tolist()):
        torch.testing.assert_close(found[0][row, :length], wanted[0][row, :length], rtol=rtol, atol=atol)
        assert not found[0][row, length:].any()
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2], rtol=min(rtol, 1e-4), atol=1e-5)


def test_no_tokens_and_no_rows_are_calls_too() -> None:
    drawn = draw(0)
    y, conv, ssm = torch_op.scan(*drawn)
    assert y.shape == (2, 0, 64)
    assert torch.equal(conv, drawn[2])
    assert torch.equal(ssm, drawn[3])
    empty = [part[:0] if isinstance(part, torch.Tensor) else part for part in draw()]
    assert torch_op.scan(*empty)[0].shape == (0, 9, 64)


def test_the_updating_operator_changes_its_ssm_state_to_the_other_ones_result() -> None:
    args = operands(draw())
    y, conv, ssm = torch.ops.mmm.selective_scan(*args)
    before = args[3]._version
    y_too, conv_too = torch.ops.mmm.selective_scan_(*args)
    assert torch.equal(args[3], ssm)
    assert torch.equal(y_too, y)
    assert torch.equal(conv_too, conv)
    assert args[3]._version == before + 1  # or a backward through an older use of it would be silently wrong


@pytest.mark.parametrize(
    "view",
    [
        lambda p: torch.cat([p, p], 1)[:, : p.shape[1]],
        lambda p: torch.cat([p[..., :3], p], 2)[..., 3:],  # no row is aligned
        lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
        lambda p: p.transpose(1, 2).contiguous().transpose(1, 2),  # no row is contiguous
    ],
)
def test_views_give_the_bits_of_their_copies(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    args = operands(draw())
    seen = view(args[0])
    assert torch.equal(seen, args[0])
    found = torch.ops.mmm.selective_scan(seen, *args[1:])
    for one, other in zip(found, torch.ops.mmm.selective_scan(*args), strict=True):
        assert torch.equal(one, other)


def test_states_that_are_views_give_the_bits_of_their_copies() -> None:
    args = list(operands(draw()))
    wanted = torch.ops.mmm.selective_scan(*args)
    args[2] = args[2].transpose(1, 2).contiguous().transpose(1, 2)
    args[3] = args[3].transpose(2, 3).contiguous().transpose(2, 3)
    for one, other in zip(torch.ops.mmm.selective_scan(*args), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["selective_scan", "selective_scan_"])
def test_the_operators_pass_pytorchs_own_checks(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mmm, name).default, operands(draw()))


def test_an_exported_program_holds_the_operator_for_any_number_of_tokens() -> None:
    class Mixer(torch.nn.Module):
        def forward(self, projected: torch.Tensor, *rest: Any) -> Any:
            return torch.ops.mmm.selective_scan(projected, *rest, 2, 1e-5)

    args = operands(draw())[:9]
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(
        Mixer(), args, dynamic_shapes={"projected": {1: tokens}, "rest": (None,) * len(args[1:])}
    )
    assert "mmm.selective_scan" in program.graph_module.code
    longer = operands(draw(14))[:9]
    for one, other in zip(program.module()(*longer), Mixer()(*longer), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_a_model_over_the_kernels_gives_the_logits_of_the_reference(
    make_checkpoint: Callable[..., Path], kind: str
) -> None:
    source = Checkpoint.open(make_checkpoint(kind))
    ids, lengths, past = torch.arange(12).reshape(2, 6) + 5, torch.tensor([6, 4]), torch.zeros(2, dtype=torch.long)
    logits = []
    for form in (torch_op.scan, model_scan.sequential):
        model = load_model(source, scan=form)
        embeds = model.embed(ids, torch.zeros(0, model.spec.hidden_size))
        first, states = model.prefill(embeds, lengths, model.initial_states(2, 16), past)
        second, _ = model.step(torch.tensor([7, 8]), states, past + lengths)
        logits.append(torch.cat([first, second]))
    # float32 throughout: 1e-4 of the largest logit is what ten layers make of sums in another order.
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4 * float(logits[1].abs().max()))


def test_a_gradient_is_refused_before_anything_runs() -> None:
    args = operands(draw())
    args[0].requires_grad_()
    before = args[3].clone()
    for name in ("selective_scan", "selective_scan_"):
        with pytest.raises(KernelError, match=f"{name} has no backward"):
            getattr(torch.ops.mmm, name)(*args)
    assert torch.equal(args[3], before)
    with torch.no_grad():
        torch.ops.mmm.selective_scan(*args)


REFUSED: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "lengths of int64": (1, lambda x: x.long(), "lengths has the wrong type"),
    "a conv state of another type": (2, lambda x: x.half(), "conv_state has the wrong type"),
    "a weight in bfloat16": (4, lambda x: x.bfloat16(), "conv_weight has the wrong type"),
    "an integer state": (3, lambda x: x.int(), "ssm_state has a type without kernels"),
    "integer rows": (0, lambda x: x.int(), "projected has a type without kernels"),
    "a weight elsewhere": (8, lambda x: x.to("meta"), "norm_weight is not where projected is"),
    "a row too short": (0, lambda x: x[..., :-1], "projected has the wrong shape"),
    "too few lengths": (1, lambda x: x[:1], "lengths has the wrong shape"),
    "a state of one axis less": (3, lambda x: x[0], "ssm_state has 3 axes"),
    "a weight of another size": (7, lambda x: x[:3], "A_log has the wrong shape"),
    "kv heads that do not divide": (9, lambda x: 3, "has the wrong shape"),
    "an eps of 0": (10, lambda x: 0.0, "eps is 0; wanted a finite number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operands_that_do_not_fit_are_refused(case: str) -> None:
    place, change, text = REFUSED[case]
    args = list(operands(draw()))
    args[place] = change(args[place])
    if case == "a weight elsewhere":  # the dispatcher would choose the fake kernel
        with pytest.raises(KernelError, match=text):
            torch_op._selective_scan(*args)
        return
    if case == "integer rows":
        args[2] = args[2].int()
    with pytest.raises(KernelError, match=text):
        torch.ops.mmm.selective_scan(*args)


def test_a_state_that_is_a_view_is_not_updated_in_place() -> None:
    args = list(operands(draw()))
    args[3] = args[3].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(KernelError, match="not contiguous"):
        torch.ops.mmm.selective_scan_(*args)


def test_float64_weights_are_not_rounded_unseen() -> None:
    drawn = draw(dtype=torch.float64)
    weights = drawn[4]
    drawn[4] = model_scan.ScanWeights(*(weight.double() for weight in vars(weights).values()))
    with pytest.raises(KernelError, match="round"):
        torch_op.scan(*drawn)


def test_without_a_built_library_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    torch_op.use_library(None)
    with pytest.raises(KernelError, match="mmm-export plugins build"):
        torch_op.scan(*draw())
