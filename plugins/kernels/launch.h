// Host entry points of the CUDA kernels, one per method. Arguments are already checked; nothing allocates or synchronises,
// every launch can be captured into a CUDA graph. Each returns cudaSuccess or the launch's error.
#ifndef MMM_KERNELS_LAUNCH_H
#define MMM_KERNELS_LAUNCH_H

#include <cuda_runtime_api.h>

#include "mmm/kernels.h"

namespace mmm {

struct Device {
  int multiprocessors;
  int major;  // compute capability
  int minor;
  int shared_memory_per_block;  // opt-in maximum, in bytes
  int id;
};

// Properties of the current device, asked once for each.
cudaError_t current_device(Device& device);

// Write to `status` what `error`, of a launch on `device`, means. Returns its code.
int32_t cuda_failed(mmm_status& status, cudaError_t error, const Device& device);

cudaError_t launch_step(const mmm_scan_args& args, const Device& device);        // T == 1
cudaError_t launch_sequential(const mmm_scan_args& args, const Device& device);  // any T >= 0

bool chunked_supports(const mmm_scan_shape& shape);
uint64_t chunked_workspace(const mmm_scan_shape& shape);  // bytes
cudaError_t launch_chunked(const mmm_scan_args& args, const Device& device);  // shapes that chunked_supports takes

}  // namespace mmm

#endif
