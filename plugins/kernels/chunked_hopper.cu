// Kernels and launches of the chunked scan on the warpgroup matrix units; empty machine code on everything but sm_90a.
// scan_segments is pass 1 (STATE_ONLY) and pass 3 of chunked.cu; pass 2 is the same. 512 threads a block, one block a processor.
// All passes in one launch, the segments of a pair of heads a cluster that meets through the L2, was slower on an H100: 30 us where
// three launches take 26 (256 tokens, 4 blocks a cluster), 44 where they take 40 (1,024 tokens, 8 blocks a cluster).
//
// EXPERIMENTAL: compiled with -DMMM_WARPGROUPS=ON alone, which no default sets. tests/gpu has not run on it.
#ifdef MMM_WARPGROUPS
#include <atomic>

#include "chunked_hopper.cuh"
#include "chunked_launch.cuh"

namespace mmm {
namespace {

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
      scan.template make_tiles<1>(number % 2);
      scan.locate();
      if (scan.more_than(number + 2)) scan.copy_rows(number + 2);
      commit_copies();
      wait_products<0>();  // of the chunk before
      pin(scan.S);
      scan.update_state(scan.own().decays[number % 2], number % 2, weighted);
      scan.prepare_next(number);
    }
    wait_products<0>();
    pin(scan.S);
    scan.store_segment();
  } else {
    if (args.segments == 1) {
      scan.load_start(args.ssm_state, args.state_dtype, scan.state_index());
    } else {
      wait_for_previous_kernel();
      scan.load_start(args.segment_states, MMM_FLOAT32, scan.segment_index());
    }
    for (int number = 0; scan.more_than(number); number++) {
      scan.template make_tiles<0>(0);
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
#endif
