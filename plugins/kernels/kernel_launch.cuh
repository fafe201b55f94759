// Launches with what the prefill kernels need: more shared memory than the default, clusters, overlap with the kernel before.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace mmm {

struct Launch {
  dim3 grid;
  int threads;
  size_t shared;           // bytes of dynamic shared memory
  cudaStream_t stream;
  bool overlap = false;    // the kernel may start while the one before it on the stream still runs
  unsigned cluster = 1;    // blocks along x that run together
};

template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid, config.blockDim = dim3(how.threads), config.dynamicSmemBytes = how.shared, config.stream = how.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (how.overlap) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

// Raise a kernel's limit of shared memory once for each device, and prefer it to the L1: two blocks that would fit on a processor
// would not by the default, which is for one.
template <auto kernel>
cudaError_t allow_shared_memory(size_t bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = 1ull << (device & 63);
  if (error != cudaSuccess || done.load(std::memory_order_relaxed) & bit) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace mmm
