// Kernels and launches of the chunked scan on the warpgroup matrix units; empty machine code on everything but sm_90a.
// scan_segments is pass 1 (STATE_ONLY) and pass 3 of chunked.cu; pass 2 is the same. 512 threads a block, one block a processor.
// All passes in one launch, the segments of a pair of heads a cluster that meets through the L2, was slower on an H100: 30 us where
// three launches take 26 (256 tokens, 4 blocks a cluster), 44 where they take 40 (1,024 tokens, 8 blocks a cluster).
#include "chunked_hopper.cuh"
#include "chunked_launch.cuh"
#include "kernel_launch.cuh"

namespace mmm {
namespace {

template <typename Element, bool STATE_ONLY>
__global__ void __launch_bounds__(512, 1) scan_segments(const __grid_constant__ ChunkedArgs args) {
#if MMM_HAS_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  using C = Warpgroups<Element, STATE_ONLY>;
  WarpgroupScan<Element, C> scan(args, *reinterpret_cast<typename C::Shared*>(memory));
  const Place& place = scan.place;
  if (STATE_ONLY) let_next_kernel_start();
  if (place.begin >= place.end) {  // nothing valid here
    if (STATE_ONLY) return;
    if (args.segments > 1) wait_for_previous_kernel();
    scan.finish_empty();
    return;
  }
  scan.copy_rows(0);
  if constexpr (STATE_ONLY) {
    commit_copies();
    if (scan.more_than(1)) scan.copy_rows(1);
  } else {
    scan.copy_gate(0);
  }
  commit_copies();
  scan.prepare();
  if constexpr (STATE_ONLY) {
    scan.clear_state();
    uint32_t weighted[4][4];
    for (int number = 0; scan.more_than(number); number++) {
      scan.template make_tiles<1>(number);
      scan.locate();
      if (scan.more_than(number + 2)) scan.copy_rows(number + 2);
      commit_copies();
      wait_products<0>();  // of the chunk before
      pin(scan.S);
      scan.update_state(scan.own().decays[number % C::AHEAD], number % C::STAGES, weighted);
    }
    wait_products<0>();
    pin(scan.S);
    scan.store_segment();
  } else {
    if (args.segments == 1) {
      scan.load_start(args.ssm_state, args.state_dtype, scan.state_index());
    } else {
      wait_for_previous_kernel();
      scan.load_segment();
    }
    for (int number = 0; scan.more_than(number); number++) {
      scan.template make_tiles<0>(number);
      scan.output(number);
    }
    scan.finish();
  }
#endif
}

template <typename Element>
cudaError_t run(const ChunkedArgs& args, int batch, cudaStream_t stream) {
  constexpr auto pass1 = scan_segments<Element, true>, pass3 = scan_segments<Element, false>;
  constexpr size_t shared1 = sizeof(typename Warpgroups<Element, true>::Shared);
  constexpr size_t shared3 = sizeof(typename Warpgroups<Element, false>::Shared);
  static_assert(shared3 <= 227 * 1024, "a block has no more shared memory");
  const dim3 blocks(args.segments, args.heads / 2, batch), but_last(args.segments - 1, args.heads / 2, batch);
  cudaError_t error = allow_shared_memory<pass3>(shared3);
  if (error == cudaSuccess && args.segments > 1) {
    error = allow_shared_memory<pass1>(shared1);
    if (error == cudaSuccess) error = launch(pass1, {but_last, 512, shared1, stream}, args);
    if (error == cudaSuccess) error = launch_start_states(args, 128 * 128, batch, stream, true, true);
  }
  if (error != cudaSuccess) return error;
  return launch(pass3, {blocks, 512, shared3, stream, args.segments > 1}, args);
}

}  // namespace

cudaError_t run_warpgroups(const ChunkedArgs& args, bool half, int batch, cudaStream_t stream) {
  return half ? run<__half>(args, batch, stream) : run<__nv_bfloat16>(args, batch, stream);
}

}  // namespace mmm
