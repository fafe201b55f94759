"""The matrix products on a GPU against float64: every format, epilogue and kernel, odd sizes, any number of tokens.

With MMM_KERNEL_DEVICE=cpu the same tests run on the CPU reference.
"""

from __future__ import annotations

import pytest
import torch

from gpu.kernels import DEVICE, library_path
from gpu.linear_calls import FORMATS, Product, oracle, quantize, relative_l2
from mmm_export.plugins.library import KernelLibrary, load_library

pytestmark = pytest.mark.gpu

FP16, BF16 = torch.float16, torch.bfloat16
# One rounding of each result, 2**-(p+1) / sqrt(3) / 0.72 of the norm for normally distributed entries and a mantissa of p bits, and
# now and then a normalised input that lies next to a tie. Without the rounding: sums of float32, whose largest terms are INT4's, 17
# times the weights in bf16 kernels.
BOUND = {FP16: 5e-4, BF16: 4e-3}
SUM_BOUND = 2e-4
EPILOGUES = ("none", "norm", "residual", "silu")
SPREADS = (1, 20811, 40812, 30821, 21611, 31621)  # the tiled kernel, then spreads of the vector kernel


@pytest.fixture(scope="module")
def kernels() -> KernelLibrary:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = library_path()
    if path is None:
        pytest.skip("no library: build it (mmm-export plugins build) or name it in MMM_KERNEL_LIBRARY")
    return load_library(path)


def check(
    kernels: KernelLibrary,
    tokens: int,
    outputs: int,
    inputs: int,
    weight_format: str,
    dtype: torch.dtype,
    epilogue: str = "none",
    variant: int = 0,
    *,
    logits: bool = False,
    overlap: bool = False,
) -> None:
    torch.manual_seed(tokens)
    x = (torch.randn(tokens, inputs, device=DEVICE) + 0.25).to(dtype)
    weight, scales, wide = quantize(torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5, weight_format, dtype)
    norm = (torch.rand(inputs, device=DEVICE) + 0.5).to(dtype) if epilogue in ("norm", "silu") else None
    residual = torch.randn(tokens, outputs, device=DEVICE).to(dtype) if epilogue == "residual" else None
    silu = epilogue == "silu"
    kind = torch.float32 if logits else dtype
    out = torch.full((tokens, outputs // 2 if silu else outputs), float("nan"), device=DEVICE, dtype=kind)
    options = {"norm_weight": norm, "residual": residual, "silu": silu}
    product = Product(kernels, x, weight, scales, out, variant=variant, overlap=overlap, **options)
    product()
    first = out.clone()
    product()
    assert torch.equal(first, out)  # equal inputs give equal bits
    assert relative_l2(out, oracle(x, wide, norm, residual, silu=silu)) <= (SUM_BOUND if logits else BOUND[dtype])


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 33])
def test_kept_rows_follow_the_others(
    kernels: KernelLibrary, tokens: int, weight_format: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    x = (torch.randn(tokens, 1024, device=DEVICE) + 0.25).to(dtype)
    norm = (torch.rand(1024, device=DEVICE) + 0.5).to(dtype)
    weight, scales, wide = quantize(torch.randn(1030, 1024, device=DEVICE) / 32, weight_format, dtype)
    kept = (torch.randn(16, 1024, device=DEVICE) / 32).to(dtype)
    for overlap in (False, True):
        out = torch.full((tokens, 1046), float("nan"), device=DEVICE, dtype=dtype)
        Product(kernels, x, weight, scales, out, norm_weight=norm, kept=kept, overlap=overlap)()
        right = oracle(x, torch.cat([wide, kept.double()]), norm)
        assert relative_l2(out, right) <= BOUND[dtype]
        assert relative_l2(out[:, 1030:], right[:, 1030:]) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 70, 200])
def test_any_number_of_tokens_agrees_with_float64(
    kernels: KernelLibrary, tokens: int, weight_format: str, dtype: torch.dtype
) -> None:
    for epilogue in EPILOGUES:
        check(kernels, tokens, 1030, 1024, weight_format, dtype, epilogue)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    "sizes", [(2, 128), (15, 256), (17, 384), (515, 128), (1001, 1152), (2048, 8192), (6160, 2048)], ids=str
)
def test_odd_sizes_agree_with_float64(kernels: KernelLibrary, weight_format: str, sizes: tuple[int, int]) -> None:
    for tokens in (1, 5, 20):
        for epilogue in EPILOGUES if sizes[0] % 2 == 0 else EPILOGUES[:3]:
            check(kernels, tokens, *sizes, weight_format, BF16, epilogue)


@pytest.mark.parametrize("weight_format", ["plain", "int8"])
@pytest.mark.parametrize("inputs", [16, 48, 80, 112, 336])
def test_rows_that_are_no_whole_chunks_agree_with_float64(
    kernels: KernelLibrary, weight_format: str, inputs: int
) -> None:
    for tokens in (1, 8, 33):
        check(kernels, tokens, 100, inputs, weight_format, FP16, "norm")


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_logits_of_the_released_model_are_not_rounded(
    kernels: KernelLibrary, weight_format: str, dtype: torch.dtype
) -> None:
    check(kernels, 1, 92_553, 2048, weight_format, dtype, logits=True)


@pytest.mark.parametrize("variant", SPREADS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_spread_computes_the_same(kernels: KernelLibrary, weight_format: str, variant: int) -> None:
    for tokens in (1, 8):
        for epilogue in EPILOGUES:
            check(kernels, tokens, 2100, 2048, weight_format, BF16, epilogue, variant)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_chain_that_overlaps_gives_the_bits_of_one_that_does_not(kernels: KernelLibrary, weight_format: str) -> None:
    weight, scales, _ = quantize(torch.randn(2048, 2048, device=DEVICE) / 45, weight_format, BF16)
    norm = torch.ones(2048, device=DEVICE, dtype=BF16)
    start = torch.randn(1, 2048, device=DEVICE).to(BF16)
    ends = []
    for overlap in (False, True):
        a, b = start.clone(), torch.empty_like(start)
        forth = Product(kernels, a, weight, scales, b, norm_weight=norm, overlap=overlap)
        back = Product(kernels, b, weight, scales, a, residual=a, overlap=overlap)
        for _ in range(200):
            forth()
            back()
        ends.append(a)
    assert torch.isfinite(ends[0]).all()
    assert torch.equal(*ends)
