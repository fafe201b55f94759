// Which kernel serves a call on the current CUDA device.
#include "abi/backend.h"
#include "launch.h"

namespace mmm {
namespace {

// A strided view that 16-byte loads can walk.
bool rows_are_aligned(const mmm_scan_args& args) {
  const bool batch = args.shape.batch <= 1 || args.projected_batch_stride % 8 == 0;
  return reinterpret_cast<uintptr_t>(args.projected) % 16 == 0 && args.projected_token_stride % 8 == 0 && batch;
}

mmm_method method_of(const mmm_scan_args& args) {
  if (args.shape.method != MMM_AUTO) return static_cast<mmm_method>(args.shape.method);
  if (args.shape.tokens == 1) return MMM_STEP;
  return chunked_supports(args.shape) && rows_are_aligned(args) ? MMM_CHUNKED : MMM_SEQUENTIAL;
}

}  // namespace

uint64_t workspace_cuda(const mmm_scan_shape& shape) {
  const bool chunked = shape.method == MMM_CHUNKED || (shape.method == MMM_AUTO && shape.tokens > 1);
  return chunked && chunked_supports(shape) ? chunked_workspace(shape) : 0;
}

int32_t scan_cuda(const mmm_scan_args& args, mmm_status& status) {
  if (args.shape.batch == 0) return MMM_OK;
  Device device = {};
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // leave no error behind for the caller's next check
    return cuda_failed(status, error, device);
  }
  const mmm_method method = method_of(args);
  if (method == MMM_CHUNKED && !chunked_supports(args.shape))
    return fail(status, MMM_UNSUPPORTED,
                "the chunked method takes float16 or bfloat16, head_dim = state_dim of 64 or 128 and at least one token; found "
                "head_dim %d, state_dim %d, %d tokens",
                args.shape.head_dim, args.shape.state_dim, args.shape.tokens);
  if (method == MMM_CHUNKED && !rows_are_aligned(args))
    return fail(status, MMM_INVALID_ARGUMENT,
                "the chunked method takes rows at multiples of 16 bytes; found strides of %lld and %lld elements",
                static_cast<long long>(args.projected_batch_stride), static_cast<long long>(args.projected_token_stride));
  switch (method) {
    case MMM_STEP:
      error = launch_step(args, device);
      break;
    case MMM_CHUNKED:
      error = launch_chunked(args, device);
      break;
    default:
      error = launch_sequential(args, device);
  }
  if (error == cudaSuccess) return MMM_OK;
  cudaGetLastError();
  return cuda_failed(status, error, device);
}

}  // namespace mmm
