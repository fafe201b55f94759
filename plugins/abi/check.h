// Refuses calls that break a promise of kernels.h, before any device sees them.
#ifndef MMM_ABI_CHECK_H
#define MMM_ABI_CHECK_H

#include <cstdint>

#include "mmm/kernels.h"

namespace mmm {

// Check sizes, types and the method. Returns MMM_OK, or writes to `status` which field is wrong, what it holds and what is wanted.
int32_t check_shape(const mmm_scan_shape& shape, mmm_status& status);

// Check the rest of a call whose shape was checked: strides, pointers, alignment, overlaps and the workspace, of which
// `workspace_bytes` are needed.
int32_t check_arguments(const mmm_scan_args& args, uint64_t workspace_bytes, mmm_status& status);

// The same for matrix products.
int32_t check_shape(const mmm_linear_shape& shape, mmm_status& status);
int32_t check_arguments(const mmm_linear_args& args, uint64_t workspace_bytes, mmm_status& status);

}  // namespace mmm

#endif
