// Chooses the sequential kernel: how many blocks share a head, and room for the state's rows and columns.
#include "launch.h"
#include "sequential.cuh"

namespace mmm {
namespace {

// Blocks a head: as many as keep the device's processors to one block each, if their rows remain multiples of 16.
int parts_of(const mmm_scan_args& args, const Device& device) {
  const mmm_scan_shape& shape = args.shape;
  if (device.major < 9) return 1;
  const auto fits = [&](int parts) { return shape.head_dim % (16 * parts) == 0; };
  for (int parts = sequential::kMostBlocks; parts > 1; parts /= 2) {
    if (!fits(parts)) continue;
    if (args.segments == parts) return parts;
    if (args.segments == 0 && static_cast<int64_t>(shape.batch) * shape.heads * parts <= device.multiprocessors)
      return parts;
  }
  return 1;
}

template <typename Element, int ROW_TILE, int VECTORS>
cudaError_t enqueue(const sequential::Args& args, const Device& device) {
  constexpr int kBytes = sizeof(sequential::Shared<ROW_TILE, VECTORS>);
  const auto kernel = sequential::scan_kernel<Element, ROW_TILE, VECTORS>;
  if (kBytes > device.shared_memory_per_block) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(args.call.shape.batch) * args.call.shape.heads * args.parts;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;

  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(sequential::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(args.call.stream);
  config.attrs = &cluster;
  if (args.parts > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(args.parts), cluster.val.clusterDim.y = 1,
    cluster.val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename Element, int ROW_TILE>
cudaError_t enqueue_columns(const sequential::Args& args, const Device& device) {
  return args.call.shape.state_dim <= 64 ? enqueue<Element, ROW_TILE, 2>(args, device)
                                         : enqueue<Element, ROW_TILE, 4>(args, device);
}

template <typename Element>
cudaError_t enqueue_rows(const sequential::Args& args, const Device& device) {
  const int rows = args.call.shape.head_dim / args.parts;
  if (rows <= 32) return enqueue_columns<Element, 1>(args, device);
  if (rows <= 64) return enqueue_columns<Element, 2>(args, device);
  return enqueue_columns<Element, 4>(args, device);
}

}  // namespace

cudaError_t launch_sequential(const mmm_scan_args& args, const Device& device) {
  if (args.shape.batch == 0) return cudaSuccess;
  const sequential::Args kernel_args = {args, parts_of(args, device)};
  if (args.shape.io_dtype == MMM_FLOAT32) return enqueue_rows<float>(kernel_args, device);
  if (args.shape.io_dtype == MMM_FLOAT16) return enqueue_rows<__half>(kernel_args, device);
  return enqueue_rows<__nv_bfloat16>(kernel_args, device);
}

}  // namespace mmm
