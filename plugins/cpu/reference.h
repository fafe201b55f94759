// The CPU implementation of kernels.h in pieces, for hosts that bring their own threads (ONNX Runtime).
#ifndef MMM_CPU_REFERENCE_H
#define MMM_CPU_REFERENCE_H

#include <cstdint>

#include "mmm/kernels.h"

namespace mmm {

// Run head `head` of row `batch` of a call whose arguments were checked. Heads and rows share no output, so that they can run in any
// order and at the same time; the short convolution of v and k is computed again by every head that shares them. Takes no memory
// but about 150 KiB of stack.
void scan_head_cpu(const mmm_scan_args& args, int64_t batch, int64_t head);

// Compute columns [first, last) of out, of a product whose arguments were checked; with MMM_EPILOGUE_SILU these are columns of the
// N/2 that it has. Columns share no output. Takes no memory but about 40 KiB of stack. `first` should be a multiple of
// kLinearColumns, since the norm of x is computed again for each so many.
constexpr int64_t kLinearColumns = 32;
void linear_columns_cpu(const mmm_linear_args& args, int64_t first, int64_t last);

}  // namespace mmm

#endif
