// Kernels and launches of the chunked scan on the warpgroup matrix units; empty machine code on everything but sm_90a.
//   scan_segments   pass 1 (STATE_ONLY) and pass 3 of chunked.cu, for long sequences
//   scan_clusters   all passes in one launch: the segments of a pair of heads are a cluster of up to 16 blocks, which meet twice
// 512 threads a block, one block a processor.
#include "chunked_hopper.cuh"
#include "chunked_launch.cuh"
#include "cluster.cuh"

namespace mmm {
namespace {

constexpr int kMostCluster = 16;  // blocks; more than 8 must be asked for, and not every GPU can place them

template <typename Element, bool STATE_ONLY>
__global__ void __launch_bounds__(512, 1) scan_segments(const __grid_constant__ ChunkedArgs args) {
#if MMM_WARPGROUP
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

#if MMM_WARPGROUP
// This block's share of pass 2: what segments add -> their start states, in place, four entries of a state a thread.
__device__ __forceinline__ void share_start_states(const ChunkedArgs& args, const Place& place) {
  constexpr int kEntries = 128 * 128, kAhead = 8;
  const int filled = max(1, (place.length + args.segment_tokens - 1) / args.segment_tokens);
  for (int i = place.segment * 512 + threadIdx.x; i < 2 * kEntries / 4; i += args.segments * 512) {
    const int64_t head = static_cast<int64_t>(place.batch) * args.heads + place.head + i / (kEntries / 4);
    const int entry = i % (kEntries / 4) * 4;
    const float2 low = load_state(args.ssm_state, args.state_dtype, head * kEntries + entry);
    const float2 high = load_state(args.ssm_state, args.state_dtype, head * kEntries + entry + 2);
    float4 carry = make_float4(low.x, low.y, high.x, high.y);
    float* const states = args.segment_states + head * args.segments * kEntries + entry;
    const float* const decays = args.segment_decays + head * args.segments;
    for (int first = 0; first < filled; first += kAhead) {
      float4 added[kAhead];
      float decay[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; s++)
        if (first + s + 1 < filled) {
          added[s] = __ldcg(reinterpret_cast<const float4*>(states + (first + s) * kEntries));
          decay[s] = __ldcg(decays + first + s);
        }
#pragma unroll
      for (int s = 0; s < kAhead; s++)
        if (first + s < filled) {
          *reinterpret_cast<float4*>(states + (first + s) * kEntries) = carry;
          if (first + s + 1 < filled) {
            const float d = exp2_fast(decay[s]);
            carry = make_float4(fmaf(carry.x, d, added[s].x), fmaf(carry.y, d, added[s].y), fmaf(carry.z, d, added[s].z),
                                fmaf(carry.w, d, added[s].w));
          }
        }
    }
  }
}
#endif

template <typename Element>
__global__ void __launch_bounds__(512, 1) scan_clusters(const __grid_constant__ ChunkedArgs args) {
#if MMM_WARPGROUP
  extern __shared__ __align__(1024) unsigned char memory[];
  using C = Warpgroups<Element, false>;
  WarpgroupScan<Element, C> scan(args, *reinterpret_cast<typename C::Shared*>(memory));
  const Place& place = scan.place;
  const bool empty = place.begin >= place.end, last = place.end == place.length, several = scan.more_than(1);
  if (!empty) {
    scan.copy_rows(0);
    scan.copy_gate(0);
    commit_copies();
    scan.prepare();
    if (!last) {  // what this segment adds
      scan.clear_state();
      for (int number = 0; scan.more_than(number); number++) {
        scan.template make_tiles<0>(0);
        if (several) scan.copy_rows(scan.more_than(number + 1) ? number + 1 : 0);
        commit_copies();
        uint32_t weighted[4][4];
        scan.update_state(scan.own().decays[number % 2], 0, weighted);
        scan.prepare_next(number);
        wait_products<0>();
        pin(scan.S);
      }
      scan.store_segment();
    }
  }
  cluster_arrive();
  cluster_wait();
  share_start_states(args, place);
  cluster_arrive();
  if (!empty && !last && several) {  // back to the first chunk
    scan.prefetch_dt(place.begin);
    if (scan.warp == 0) {
      scan.prepare_decays(scan.own().decays[0]);
      scan.prefetch_dt(place.begin + kChunk);
    }
  }
  cluster_wait();
  if (empty) {
    scan.finish_empty();
    return;
  }
  scan.load_start(args.segment_states, MMM_FLOAT32, scan.segment_index());
  for (int number = 0; scan.more_than(number); number++) {
    if (number > 0 || last || several) scan.template make_tiles<0>(0);
    scan.output(number);
  }
  scan.finish();
#endif
}

// Whether the device can run all clusters of a launch at once; else waves of them would follow each other.
bool clusters_fit(const void* kernel, cudaLaunchConfig_t& config, unsigned wanted) {
  int most = 0;
  if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) == cudaSuccess) return static_cast<unsigned>(most) >= wanted;
  cudaGetLastError();
  return false;
}

template <typename Element>
cudaError_t run(const ChunkedArgs& args, int batch, cudaStream_t stream, bool cluster) {
  constexpr auto pass1 = scan_segments<Element, true>, pass3 = scan_segments<Element, false>;
  constexpr auto all = scan_clusters<Element>;
  constexpr size_t shared1 = sizeof(typename Warpgroups<Element, true>::Shared);
  constexpr size_t shared3 = sizeof(typename Warpgroups<Element, false>::Shared);
  const dim3 blocks(args.segments, args.heads / 2, batch), but_last(args.segments - 1, args.heads / 2, batch);
  cudaError_t error = cudaSuccess;
  if (cluster && args.segments > 1 && args.segments <= kMostCluster) {
    error = allow_shared_memory<all>(shared3, true);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = dim3(512), config.dynamicSmemBytes = shared3, config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = args.segments, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    if (clusters_fit(reinterpret_cast<const void*>(all), config, blocks.y * blocks.z)) return cudaLaunchKernelEx(&config, all, args);
  }
  error = allow_shared_memory<pass3>(shared3);
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
#ifdef MMM_CLUSTER_CHUNKS
  const bool cluster = args.segment_tokens <= MMM_CLUSTER_CHUNKS * kChunk;
#else
  const bool cluster = args.segment_tokens <= 2 * kChunk;
#endif
  return half ? run<__half>(args, batch, stream, cluster) : run<__nv_bfloat16>(args, batch, stream, cluster);
}

}  // namespace mmm
