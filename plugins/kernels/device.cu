// The current CUDA device, and the sentences for what it refuses.
#include "abi/backend.h"
#include "launch.h"

namespace mmm {

cudaError_t current_device(Device& device) {
  constexpr int kMost = 64;
  static Device known[kMost];
  static int ready[kMost];  // written after the entry, read before it
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  const bool cached = id >= 0 && id < kMost;
  if (cached && __atomic_load_n(&ready[id], __ATOMIC_ACQUIRE)) {
    device = known[id];
    return cudaSuccess;
  }
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } asked[] = {{&device.multiprocessors, cudaDevAttrMultiProcessorCount},
               {&device.major, cudaDevAttrComputeCapabilityMajor},
               {&device.minor, cudaDevAttrComputeCapabilityMinor},
               {&device.shared_memory_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& one : asked)
    if ((error = cudaDeviceGetAttribute(one.value, one.attribute, id)) != cudaSuccess) return error;
  device.id = id;
  if (cached) {
    known[id] = device;  // racing threads write the same values
    __atomic_store_n(&ready[id], 1, __ATOMIC_RELEASE);
  }
  return cudaSuccess;
}

int32_t cuda_failed(mmm_status& status, cudaError_t error, const Device& device) {
  switch (error) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return fail(status, MMM_WRONG_DEVICE, "no CUDA device: %s", cudaGetErrorString(error));
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return fail(status, MMM_WRONG_DEVICE,
                  "the device is sm_%d%d, this library was built for %s; build it for this device: "
                  "mmm-export plugins build --cuda-arch %d%d",
                  device.major, device.minor, MMM_ARCHITECTURES, device.major, device.minor);
    default:
      return fail(status, MMM_CUDA_ERROR, "CUDA refused the launch: %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  }
}

}  // namespace mmm
