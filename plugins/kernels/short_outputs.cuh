// make_outputs: grid (2 segments, H, B), 256 threads. A block makes y of two chunks of a segment of one head, the last and the first
// or the two between: a warpgroup each, with everything that it reads fetched at once. For each chunk up to its own
//   M = q k^T, its columns weighted and decayed to the start of its own chunk, packed: the left operand of y += M v
// on top of q S^T with the state before the segment; then y is decayed to each of its tokens, and its own chunk added with decays
// within. Rows of y lie whole in a warp, so the RMS norm needs no exchange. Shared memory 197 KB: one block a processor.
#pragma once

#include "bulk.cuh"
#include "short_layout.cuh"

namespace mmm {

struct ShortOutputs {
  static constexpr int THREADS = 256;
  struct Shared {
    unsigned char start[kStateBytes];                       // then a tile of the gate for each warpgroup; then y
    unsigned char q[2][kTileBytes];                         // of each warpgroup
    unsigned char tiles[kSegmentChunks][2][kTileBytes];     // k and v
    ChunkDecays own[2];                                     // of each warpgroup's chunk
    float2 weight[2][kSegmentChunks - 1][kChunk / 2];       // [warpgroup][chunk]: of its tokens at the start of the own chunk
    float norm_weight[kShortDim];
    Counter full[kSegmentChunks], opened;                   // chunks; start and q
  };
  static_assert(2 * kTileBytes <= kStateBytes, "the gate takes the place of the start state");
};

template <typename Element>
struct ShortChunk {
  using Shared = ShortOutputs::Shared;
  using M = Matrix<Element>;
  using W = WarpgroupMatrix<Element>;

  const ShortArgs& args;
  Shared& shared;
  const ChunkDecays* decays;  // of the segment's chunks
  int batch, head, first, length;
  int group, warp, lane;      // warpgroup; warp of it
  int own, chunk;             // number of the own chunk in its segment, and of all

  __device__ __forceinline__ ShortChunk(const ShortArgs& args, Shared& shared) : args(args), shared(shared) {
    batch = blockIdx.z, head = blockIdx.y, first = blockIdx.x / 2 * kSegmentChunks, length = args.scan.length(batch);
    lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    decays = args.decays_of(batch, head) + first;
    own = own_of(group), chunk = first + own;
  }
  static __device__ __forceinline__ int own_of(int group) { return blockIdx.x % 2 == 0 ? 3 - 3 * group : 2 - group; }
  __device__ __forceinline__ bool has_tokens(int group) const { return (first + own_of(group)) * kChunk < length; }

  // By one thread of each warp, since one thread needs a while for each copy.
  __device__ __forceinline__ void fetch(int number) const {
    const int kv_heads = args.scan.kv_heads, kv = head / (args.scan.heads / kv_heads);
    const int last = has_tokens(0) ? own_of(0) : has_tokens(1) ? own_of(1) : -1;
    if (number <= last && number < kSegmentChunks) {
      Counter& full = shared.full[number];
      full.expect(2 * kTileBytes);
      copy_bulk(shared.tiles[number][0], args.tile(batch, first + number, kv_heads + kv), kTileBytes, full);
      copy_bulk(shared.tiles[number][1], args.tile(batch, first + number, kv), kTileBytes, full);
    } else if (number == 4 && last >= 0) {
      shared.opened.expect(kStateBytes + (has_tokens(0) + has_tokens(1)) * kTileBytes);
      copy_bulk(shared.start, args.start(batch, head, first / kSegmentChunks), kStateBytes, shared.opened);
    } else if (number >= 5 && number < 7 && has_tokens(number - 5)) {
      copy_bulk(shared.q[number - 5], args.tile(batch, first + own_of(number - 5), 2 * kv_heads + head), kTileBytes, shared.opened);
    }
  }

  // Rows of the gate that this warp will need, and zeros past the row's length.
  __device__ __forceinline__ void copy_gate() const {
    const int channel = (args.tiles_of_chunk() + head) * kShortDim + lane % 16 * 8;
    const Element* const rows = static_cast<const Element*>(args.scan.projected) + batch * args.scan.batch_stride + channel;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = warp * 16 + i * 2 + lane / 16, t = chunk * kChunk + r;
      copy_async(shared_address(gate_unit(r, lane % 16)), rows + t * args.scan.token_stride, t < length);
    }
    commit_copies();
  }
  __device__ __forceinline__ unsigned char* gate_unit(int r, int unit) const {
    return shared.start + group * kTileBytes + unit / 8 * kHalfTileBytes + tile_offset(r, unit % 8);
  }

  // What a token of each chunk before the own one weighs at its start; returns what the start state does.
  __device__ __forceinline__ float weigh() const {
    float2 weight = make_float2(0.f, 0.f);
    if (warp < own) weight = *reinterpret_cast<const float2*>(&decays[warp].weight[2 * lane]);
    for (int i = threadIdx.x % 128; i < static_cast<int>(sizeof(ChunkDecays) / 16); i += 128)
      reinterpret_cast<float4*>(&shared.own[group])[i] = reinterpret_cast<const float4*>(&decays[own])[i];
    float whole = 0.f, after = 0.f;  // log2 of the decay from the segment's start, and from the end of this warp's chunk
#pragma unroll
    for (int c = 0; c < kSegmentChunks - 1; c++) {
      const float end = c < own ? decays[c].end : 0.f;
      whole += end;
      if (c > warp) after += end;
    }
    const float factor = exp2_fast(after);
    if (warp < kSegmentChunks - 1) shared.weight[group][warp][lane] = make_float2(weight.x * factor, weight.y * factor);
    return exp2_fast(whole);
  }

  // y = q S^T; under way.
  __device__ __forceinline__ void multiply_start(float (&y)[64]) const {
    const uint64_t q = tile_descriptor(shared_address(shared.q[group])), start = tile_descriptor(shared_address(shared.start));
#pragma unroll
    for (int kk = 0; kk < kShortDim / 16; kk++)
      W::tiles_128(y, q + ((kk / 4 * kHalfTileBytes + kk % 4 * 32) >> 4), start + ((kk / 4 * kHalfStateBytes + kk % 4 * 32) >> 4),
                   kk > 0);
  }
  // m = q k^T; under way.
  __device__ __forceinline__ void multiply_k(float (&m)[32], int c) const {
    const uint64_t q = tile_descriptor(shared_address(shared.q[group])), k = tile_descriptor(shared_address(shared.tiles[c][0]));
#pragma unroll
    for (int kk = 0; kk < kShortDim / 16; kk++) {
      const int step = (kk / 4 * kHalfTileBytes + kk % 4 * 32) >> 4;
      W::tiles_64(m, q + step, k + step, kk > 0);
    }
  }
  // y += m v; under way.
  __device__ __forceinline__ void multiply_v(float (&y)[64], const uint32_t (&m)[4][4], int c) const {
    const uint64_t v = tile_descriptor(shared_address(shared.tiles[c][1]), kHalfTileBytes);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) W::held_across_128(y, m[kk], v + (kk * 16 * kTileRow >> 4));
  }

  // m of a chunk before the own one, packed.
  __device__ __forceinline__ void pack_before(uint32_t (&packed)[4][4], const float (&m)[32], int c) const {
    const float2* const weight = shared.weight[group][c] + lane % 4;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const float2 w = weight[4 * n];
      packed[n / 2][n % 2 * 2] = M::pack(m[4 * n] * w.x, m[4 * n + 1] * w.y);
      packed[n / 2][n % 2 * 2 + 1] = M::pack(m[4 * n + 2] * w.x, m[4 * n + 3] * w.y);
    }
  }
  // m of the own chunk.
  __device__ __forceinline__ void pack_own(uint32_t (&packed)[4][4], const float (&m)[32]) const {
    const ChunkDecays& d = shared.own[group];
    const int i = warp * 16 + lane / 4;
    const float upper = d.decay[i], lower = d.decay[i + 8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const int j = n * 8 + lane % 4 * 2;
      const float2 arrival = *reinterpret_cast<const float2*>(&d.arrival[j]);
      packed[n / 2][n % 2 * 2] = M::pack(j <= i ? m[4 * n] * exp2_fast(upper - arrival.x) : 0.f,
                                         j + 1 <= i ? m[4 * n + 1] * exp2_fast(upper - arrival.y) : 0.f);
      packed[n / 2][n % 2 * 2 + 1] = M::pack(j <= i + 8 ? m[4 * n + 2] * exp2_fast(lower - arrival.x) : 0.f,
                                             j + 1 <= i + 8 ? m[4 * n + 3] * exp2_fast(lower - arrival.y) : 0.f);
    }
  }
  // y decayed from the start of the own chunk to each of its tokens.
  __device__ __forceinline__ void decay_rows(float (&y)[64]) const {
    const float* const decay = shared.own[group].decay + warp * 16 + lane / 4;
    const float upper = exp2_fast(decay[0]), lower = exp2_fast(decay[8]);
#pragma unroll
    for (int n = 0; n < 16; n++) y[4 * n] *= upper, y[4 * n + 1] *= upper, y[4 * n + 2] *= lower, y[4 * n + 3] *= lower;
  }

  // Everything of one warpgroup.
  __device__ __forceinline__ void compute() {
    const float whole = weigh();
    barrier(1 + group, 128);
    float y[64], m[32];
    shared.opened.wait(0);
    shared.full[0].wait(0);
    pin(y), pin(m);
    begin_products();
    multiply_start(y);
    multiply_k(m, 0);
    commit_products();
    wait_products<0>();
    pin(y), pin(m);
    barrier(3, 128 * (has_tokens(0) + has_tokens(1)));  // nobody reads the start state any more
    copy_gate();
#pragma unroll
    for (int i = 0; i < 64; i++) y[i] *= whole;
    uint32_t packed[4][4];
    for (int c = 0; c < own; c++) {
      pack_before(packed, m, c);
      shared.full[c + 1].wait(0);
      pin(y), pin(m);
      begin_products();
      multiply_v(y, packed, c);
      multiply_k(m, c + 1);
      commit_products();
      wait_products<0>();
      pin(y), pin(m);
    }
    decay_rows(y);
    pack_own(packed, m);
    pin(y);
    begin_products();
    multiply_v(y, packed, own);
    commit_products();
    wait_products<0>();
    pin(y);
    write(y);
  }

  // Gated RMS norm of y, in the gate's place in shared memory, and from there whole rows to memory.
  __device__ __forceinline__ void write(const float (&y)[64]) const {
    float upper = 0.f, lower = 0.f;
#pragma unroll
    for (int n = 0; n < 16; n++) {
      upper += y[4 * n] * y[4 * n] + y[4 * n + 1] * y[4 * n + 1];
      lower += y[4 * n + 2] * y[4 * n + 2] + y[4 * n + 3] * y[4 * n + 3];
    }
    upper += __shfl_xor_sync(~0u, upper, 1), upper += __shfl_xor_sync(~0u, upper, 2);
    lower += __shfl_xor_sync(~0u, lower, 1), lower += __shfl_xor_sync(~0u, lower, 2);
    upper = rsqrtf(upper * (1.f / kShortDim) + args.scan.eps), lower = rsqrtf(lower * (1.f / kShortDim) + args.scan.eps);
    wait_copies<0>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 16; n++) {
      const float2 norm = *reinterpret_cast<const float2*>(&shared.norm_weight[n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t* const word = reinterpret_cast<uint32_t*>(gate_unit(warp * 16 + half * 8 + lane / 4, n)) + lane % 4;
        const float2 gate = M::unpack(*word);
        const float scale = half ? lower : upper;
        *word = M::pack(y[4 * n + 2 * half] * scale * norm.x * silu_of_double<Element>(0.5f * gate.x),
                        y[4 * n + 2 * half + 1] * scale * norm.y * silu_of_double<Element>(0.5f * gate.y));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = warp * 16 + i * 2 + lane / 16, t = chunk * kChunk + r;
      if (t < args.scan.tokens) *output(t, lane % 16) = *reinterpret_cast<const uint4*>(gate_unit(r, lane % 16));
    }
  }
  __device__ __forceinline__ uint4* output(int t, int unit) const {
    const int64_t row = (static_cast<int64_t>(batch) * args.scan.tokens + t) * args.scan.heads + head;
    return reinterpret_cast<uint4*>(static_cast<Element*>(args.scan.y) + row * kShortDim) + unit;
  }
  // Zeros for a chunk past the row's length.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x % 128; i < kChunk * 16; i += 128) {
      const int t = chunk * kChunk + i / 16;
      if (t < args.scan.tokens) *output(t, i % 16) = make_uint4(0, 0, 0, 0);
    }
  }
};

template <typename Element>
__global__ void __launch_bounds__(256, 1) make_outputs(const __grid_constant__ ShortArgs args) {
#if MMM_HAS_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ShortOutputs::Shared*>(memory);
  ShortChunk<Element> own(args, shared);
  if (threadIdx.x == 0) {
    for (int c = 0; c < kSegmentChunks; c++) shared.full[c].open(1);
    shared.opened.open(1);
  }
  if (threadIdx.x < kShortDim) shared.norm_weight[threadIdx.x] = args.scan.norm_weight[threadIdx.x];
  __syncthreads();
  wait_for_previous_kernel();
  if (own.lane == 0) own.fetch(threadIdx.x / 32);
  __syncwarp();
  if (own.has_tokens(own.group))
    own.compute();
  else
    own.clear();
#endif
}

}  // namespace mmm
