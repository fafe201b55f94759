// Launches of the chunked scan on the warpgroup matrix units; empty machine code on everything but sm_90a.
#include "chunked_hopper.cuh"
#include "chunked_launch.cuh"

namespace mmm {
namespace {

template <typename Element, bool STATE_ONLY>
__global__ void __launch_bounds__(512, 1) warpgroup_kernel(const __grid_constant__ ChunkedArgs args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  scan_segment<Element, STATE_ONLY>(args, memory);
}

template <typename Element>
cudaError_t run(const ChunkedArgs& args, int batch, cudaStream_t stream) {
  constexpr auto pass1 = warpgroup_kernel<Element, true>, pass3 = warpgroup_kernel<Element, false>;
  constexpr size_t shared1 = sizeof(typename Warpgroups<Element, true>::Shared);
  constexpr size_t shared3 = sizeof(typename Warpgroups<Element, false>::Shared);
  const dim3 blocks(args.segments, args.heads / 2, batch), but_last(args.segments - 1, args.heads / 2, batch);
  cudaError_t error = allow_shared_memory<pass3>(shared3);
  if (error == cudaSuccess && args.segments > 1) {
    error = allow_shared_memory<pass1>(shared1);
    if (error == cudaSuccess) error = launch(pass1, but_last, 512, shared1, stream, false, args);
    if (error == cudaSuccess) error = launch_start_states(args, 128 * 128, batch, stream, true);
  }
  if (error != cudaSuccess) return error;
  return launch(pass3, blocks, 512, shared3, stream, args.segments > 1, args);
}

}  // namespace

cudaError_t run_warpgroups(const ChunkedArgs& args, bool half, int batch, cudaStream_t stream) {
  return half ? run<__half>(args, batch, stream) : run<__nv_bfloat16>(args, batch, stream);
}

}  // namespace mmm
