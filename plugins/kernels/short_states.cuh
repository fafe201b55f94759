// make_states: grid (segments, 4 H, B), 128 threads, the segments of a row a cluster. A block makes 64 rows (of P) x 64 columns (of
// N) of what its segment adds to the state, sum of (weight v)^T k over its chunks; the first adds the start state. Then each block
// reads what the blocks before it added, and writes the state before its segment for make_outputs; the last one the end state.
// All chunks of a segment are fetched at once: 82 KB of shared memory, two blocks a processor.
#pragma once

#include "bulk.cuh"
#include "chunked_state.cuh"
#include "cluster.cuh"
#include "short_layout.cuh"

namespace mmm {

struct ShortStates {
  static constexpr int THREADS = 32 * kSegmentChunks;
  struct Shared {
    unsigned char tiles[kSegmentChunks][2][kHalfTileBytes];  // of v, of k
    float4 added[8][THREADS];                                // S of each thread
    float2 weight[kSegmentChunks][kChunk / 2];               // of a token at the end of the segment
    Counter full[kSegmentChunks];
    float total;                                             // log2 of the decay over the segment
  };
};

template <typename Element>
__global__ void __launch_bounds__(128) make_states(const __grid_constant__ ShortArgs args) {
#if MMM_HAS_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  using M = Matrix<Element>;
  using W = WarpgroupMatrix<Element>;
  auto& shared = *reinterpret_cast<ShortStates::Shared*>(memory);
  const ChunkedArgs& scan = args.scan;
  const int segment = blockIdx.x, rows = blockIdx.y / 2 % 2, columns = blockIdx.y % 2, head = blockIdx.y / 4, batch = blockIdx.z;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, kv = head / (scan.heads / scan.kv_heads);
  const int filled = args.filled(batch), first = segment * kSegmentChunks, count = min(max(filled - first, 0), kSegmentChunks);
  const int last = max(filled - 1, 0) / kSegmentChunks;  // the segment after which the end state is
  const int64_t at = (static_cast<int64_t>(batch * scan.heads + head) * kShortDim + rows * 64 + warp * 16 + lane / 4) * kShortDim +
                     columns * 64 + lane % 4 * 2;  // of this thread's first entry; then columns 8 * (i / 2), rows + 8 * (i % 2)
  float2 start[16];
#pragma unroll
  for (int i = 0; i < 16; i++)
    start[i] = segment > 0 ? make_float2(0.f, 0.f)
                           : load_state(scan.ssm_state, scan.state_dtype, at + i / 2 * 8 + i % 2 * 8 * kShortDim);
  if (lane == 0) shared.full[warp].open(1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (lane == 0 && warp < count) {  // a chunk each, since one thread needs a while for each copy
    Counter& full = shared.full[warp];
    full.expect(2 * kHalfTileBytes);
    copy_bulk(shared.tiles[warp][0], args.tile(batch, first + warp, kv) + rows * kHalfTileBytes, kHalfTileBytes, full);
    copy_bulk(shared.tiles[warp][1], args.tile(batch, first + warp, scan.kv_heads + kv) + columns * kHalfTileBytes, kHalfTileBytes,
              full);
  }
  __syncwarp();
  float total = 0.f;
  {
    const ChunkDecays* const decays = args.decays_of(batch, head) + first;
    float2 weight = make_float2(0.f, 0.f);
    if (warp < count) weight = *reinterpret_cast<const float2*>(&decays[warp].weight[2 * lane]);
    float after = 0.f;  // log2 of the decay from the end of this warp's chunk to that of the segment
#pragma unroll
    for (int c = 0; c < kSegmentChunks; c++) {
      const float end = c < count ? decays[c].end : 0.f;
      total += end;
      if (c > warp) after += end;
    }
    const float factor = exp2_fast(after);
    shared.weight[warp][lane] = make_float2(weight.x * factor, weight.y * factor);
    if (thread == 0) shared.total = total;
  }
  __syncthreads();

  float S[32] = {};
  const int across = tile_offset(lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2);
  for (int c = 0; c < count; c++) {
    shared.full[c].wait(0);
    const uint32_t v = shared_address(shared.tiles[c][0]) + across;
    uint32_t a[4][4];
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      load_matrices_transposed(a[kk], v + kk * 16 * kTileRow);
      const float2 w0 = shared.weight[c][kk * 8 + lane % 4], w1 = shared.weight[c][kk * 8 + 4 + lane % 4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 x = M::unpack(a[kk][e]), w = e < 2 ? w0 : w1;
        a[kk][e] = M::pack(x.x * w.x, x.y * w.y);
      }
    }
    const uint64_t k = tile_descriptor(shared_address(shared.tiles[c][1]));
    pin(S);
    begin_products();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) W::held_across_64(S, a[kk], k + (kk * 16 * kTileRow >> 4));
    commit_products();
    wait_products<0>();
    pin(S);
  }
  if (segment == 0) {
    const float decay = exp2_fast(total);
#pragma unroll
    for (int i = 0; i < 16; i++) S[2 * i] = fmaf(start[i].x, decay, S[2 * i]), S[2 * i + 1] = fmaf(start[i].y, decay, S[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) shared.added[i][thread] = make_float4(S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]);
  __syncwarp();
  cluster_arrive();
  cluster_wait();

  // The state before this segment, from the nearest segment back to the first.
  float between = 0.f;
  for (int before = segment - 1; before >= 0 && count > 0; before--) {
    const uint32_t from = address_in_block(shared_address(&shared.added[0][thread]), before);
    const float factor = exp2_fast(between);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float4 part = load_4_from_block(from + i * ShortStates::THREADS * 16);
      start[2 * i] = make_float2(fmaf(part.x, factor, start[2 * i].x), fmaf(part.y, factor, start[2 * i].y));
      start[2 * i + 1] = make_float2(fmaf(part.z, factor, start[2 * i + 1].x), fmaf(part.w, factor, start[2 * i + 1].y));
    }
    between += load_from_block(address_in_block(shared_address(&shared.total), before));
  }
  if (count > 0) {
    unsigned char* const image = args.start(batch, head, segment) + columns * kHalfStateBytes + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 16; i++)
      *reinterpret_cast<uint32_t*>(image + tile_offset(rows * 64 + warp * 16 + i % 2 * 8 + lane / 4, i / 2)) =
          M::pack(start[i].x, start[i].y);
  }
  if (segment == last) {
    const float decay = segment > 0 ? exp2_fast(total) : 0.f;  // the first has its start state within
#pragma unroll
    for (int i = 0; i < 16; i++)
      store_state(scan.ssm_state_out, scan.state_dtype, at + i / 2 * 8 + i % 2 * 8 * kShortDim, fmaf(start[i].x, decay, S[2 * i]),
                  fmaf(start[i].y, decay, S[2 * i + 1]));
  }
  __syncwarp();
  cluster_arrive_relaxed();  // no block ends while another may read its part
  cluster_wait();
#endif
}

}  // namespace mmm
