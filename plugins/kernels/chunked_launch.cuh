// How the passes of the chunked scan are launched; shared by its two implementations.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "chunked_layout.cuh"

namespace mmm {

// `overlap`: the kernel may start while the one before it on the stream still runs.
template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, int threads, size_t shared, cudaStream_t stream, bool overlap, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Raise a kernel's limit of shared memory once for each device.
template <auto kernel>
cudaError_t allow_shared_memory(size_t bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = 1ull << (device & 63);
  if (error != cudaSuccess || done.load(std::memory_order_relaxed) & bit) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Pass 2, for states of so many entries.
cudaError_t launch_start_states(const ChunkedArgs& args, int state_entries, int batch, cudaStream_t stream, bool overlap);

// All passes on the warpgroup matrix units: two heads a block, head_dim and state_dim 128, conv width 2, compute capability 9.0.
cudaError_t run_warpgroups(const ChunkedArgs& args, bool half, int batch, cudaStream_t stream);

}  // namespace mmm
