// The CPU implementation of kernels.h by heads, for hosts that bring their own threads (ONNX Runtime).
#ifndef MMM_CPU_REFERENCE_H
#define MMM_CPU_REFERENCE_H

#include <cstdint>

#include "mmm/kernels.h"

namespace mmm {

// Run head `head` of row `batch` of a call whose arguments were checked. Heads and rows share no output, so that they can run in any
// order and at the same time; the short convolution of v and k is computed again by every head that shares them. Takes no memory
// but about 150 KiB of stack.
void scan_head_cpu(const mmm_scan_args& args, int64_t batch, int64_t head);

}  // namespace mmm

#endif
