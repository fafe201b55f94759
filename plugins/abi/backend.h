// What lies between the C entry points (entry.cpp) and the code that computes: one function per device, and what they share.
#ifndef MMM_ABI_BACKEND_H
#define MMM_ABI_BACKEND_H

#include <cstdint>

#include "mmm/kernels.h"

namespace mmm {

// Run a call whose arguments were checked (check.h) on host memory. Never fails.
int32_t scan_cpu(const mmm_scan_args& args, mmm_status& status);

// Enqueue a call whose arguments were checked on args.stream. In libraries built with MMM_WITH_CUDA only.
int32_t scan_cuda(const mmm_scan_args& args, mmm_status& status);

// Bytes of workspace that scan_cuda needs for a checked shape. In libraries built with MMM_WITH_CUDA only.
uint64_t workspace_cuda(const mmm_scan_shape& shape);

// The same for matrix products.
int32_t linear_cpu(const mmm_linear_args& args, mmm_status& status);
int32_t linear_cuda(const mmm_linear_args& args, mmm_status& status);
uint64_t linear_workspace_cuda(const mmm_linear_shape& shape);

// Somebody else's matrix product on a GPU, such as cuBLAS: enqueue out (M, N) = x (M, K) W (N, K)^T, plus what is in out if `accumulate`,
// all contiguous, in io_dtype but for out in `out_dtype`. Sums are float32.
class ForeignProduct {
 public:
  virtual bool enqueue(const mmm_linear_shape& shape, const void* x, const void* weight, void* out, int32_t out_dtype,
                       bool accumulate) const = 0;

 protected:
  ~ForeignProduct() = default;
};

// As linear_cuda, for a plain weight and contiguous x, by a product that is better at many tokens; norm and epilogue are kernels of ours.
int32_t linear_cuda(const mmm_linear_args& args, const ForeignProduct& product, mmm_status& status);
uint64_t linear_workspace_cuda(const mmm_linear_shape& shape, const ForeignProduct& product);

// Write `code` and the formatted text to `status`, cut to MMM_STATUS_TEXT_BYTES; returns `code`.
[[gnu::format(printf, 3, 4)]] int32_t fail(mmm_status& status, mmm_code code, const char* format, ...);

// C, the channels of the short convolution: [v | k | q]. No int32 overflows an int64 here.
inline int64_t conv_channels(const mmm_scan_shape& shape) {
  const int64_t kv_heads = shape.kv_heads, heads = shape.heads;
  return kv_heads * shape.head_dim + kv_heads * shape.state_dim + heads * shape.state_dim;
}

// W, the elements of a projected row: [v | k | q | gate | dt].
inline int64_t row_width(const mmm_scan_shape& shape) {
  return conv_channels(shape) + int64_t{shape.heads} * shape.head_dim + shape.heads;
}

// Columns of out.
inline int64_t linear_columns(const mmm_linear_shape& shape) {
  return shape.epilogue == MMM_EPILOGUE_SILU ? shape.outputs / 2 : shape.outputs;
}

// Bytes of one element, 0 for a number that is no mmm_dtype.
inline int64_t element_bytes(int32_t dtype) {
  switch (dtype) {
    case MMM_FLOAT32: return 4;
    case MMM_FLOAT16: return 2;
    case MMM_BFLOAT16: return 2;
    case MMM_FLOAT64: return 8;
    default: return 0;
  }
}

}  // namespace mmm

#endif
