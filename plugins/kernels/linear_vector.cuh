// out = epilogue(norm(x) W^T) for up to 8 rows of x, by the bytes of W alone: each weight is read once and goes into a matrix
// instruction (m16n8k16) whose 16 rows are rows of W and whose 8 columns are rows of x. So 8 rows cost little more than one, and the
// integer formats take one to two instructions a weight.
//
//   grid   a few blocks a multiprocessor; block b takes tiles b, b + blocks, ... of R x 16 rows of W (SiLU: R = 2, gate and up)
//   block  WARPS warps share K: warp w takes neighbouring spans of 128 bytes of every row; sums meet in shared memory, once a tile
//   ring   `depth` spans (16 R rows of 128 bytes) of each warp are being copied to shared memory, across tiles; those of the first
//          tiles begin before the previous kernel has ended (overlap), which on a chain of small products hides most of their latency.
//          Copies, since a warp can wait for six sets of loads into registers apart, and no more
//   lane   l multiplies the 16 bytes l % 4 of a chunk of 64 from rows l / 4 and l / 4 + 8
//   shared x in the order of the fragments, M x K x 2 bytes, normalised, and the sums of its chunks; the rings; two buffers of sums
#pragma once

#include <type_traits>

#include "linear_staging.cuh"
#include "linear_weights.cuh"
#include "matrix.cuh"
#include "types.cuh"

namespace mmm {

constexpr int kTileRows = 16, kChunkBytes = 64, kSpanBytes = 128;
constexpr int kMostDepth = 4;
constexpr int kSumStride = 20;  // of a token's 16 sums: the four lanes of a row then write to four different sets of banks

// FEW: for one or two rows of x. A block meets all its code for the first time, so code for more would cost time even where it is not run.
template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
struct Vector {
  using Format = Weights<Element, FORMAT>;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kPieces = Format::kInputs / 8;  // 16-byte pieces of x for 16 bytes of weights
  static constexpr int kStageBytes = R * kTileRows * kSpanBytes;
  // Whether INT4's offset is taken off the sums and not off each weight. In bfloat16 it is 17 times the largest weight, which costs the
  // sums four bits of float32; in float16 it would be 129 times. For few rows it is the sum of each chunk of x that is taken off.
  static constexpr bool kOffset = FORMAT == MMM_WEIGHT_INT4 && std::is_same<Element, __nv_bfloat16>::value;
  static constexpr float kMinus = -136.f;  // Magic::kBase + 8
  static constexpr bool kChunkSums = kOffset && FEW;
  static constexpr int kScales = FORMAT == MMM_WEIGHT_PLAIN ? 0 : R * kTileRows;  // 4-byte words of a stage

  static __host__ __device__ int sum_floats(int tokens) { return WARPS * R * tokens * kSumStride; }
  static int shared_bytes(int tokens, int chunks, int depth) {
    return 4 * kPieces * chunks * tokens * 16 + WARPS * depth * (kStageBytes + 4 * kScales) + 2 * sum_floats(tokens) * 4 +
           WARPS * 8 * 4 + (kChunkSums ? chunks * 8 * 4 : 0);
  }
};

__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes to shared memory, past the L1 and first to leave the L2; zeros, and no read, unless `valid`.
__device__ __forceinline__ void copy_once(uint32_t shared, const char* global, bool valid, uint64_t policy) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global), "r"(bytes),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy_word(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

// Wait for the oldest of `depth` groups of copies.
__device__ __forceinline__ void wait_for_oldest(int depth) {
  if (depth == 2) wait_copies<1>();
  else if (depth == 3) wait_copies<2>();
  else if (depth == 4) wait_copies<3>();
  else wait_copies<0>();
}

__device__ __forceinline__ uint32_t load_16_bits(const void* base, int64_t index) {
  unsigned short v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(static_cast<const unsigned short*>(base) + index));
  return v;
}

// What block `block` of `blocks` computes.
template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
__device__ __forceinline__ void linear_vector(const VectorArgs& a, int block, int blocks) {
  using V = Vector<Element, FORMAT, WARPS, R, FEW>;
  extern __shared__ __align__(128) uint4 shared[];
  const int M = a.tokens;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  char* const rings = reinterpret_cast<char*>(shared);
  uint4* const staged = reinterpret_cast<uint4*>(rings + WARPS * a.depth * V::kStageBytes);
  float* const sums = reinterpret_cast<float*>(staged + 4 * V::kPieces * a.chunks * M);
  float* const partial = sums + 2 * V::sum_floats(M);
  float* const chunk_sums = partial + WARPS * 8;
  uint32_t* const scale_rings = reinterpret_cast<uint32_t*>(chunk_sums + (V::kChunkSums ? a.chunks * 8 : 0));
  const char* const ring = rings + warp * a.depth * V::kStageBytes;
  uint32_t* const scale_ring = scale_rings + warp * a.depth * V::kScales;

  const int spans_a_warp = ((a.chunks + 1) / 2 + WARPS - 1) / WARPS, first_chunk = 2 * warp * spans_a_warp;
  const bool silu = a.epilogue == MMM_EPILOGUE_SILU;
  const int half = a.rows / 2;
  const uint64_t policy = read_once_policy();
  if (a.overlap) let_next_kernel_start();

  // Copies of a span: four times four rows of 128 bytes. Lane l copies unit l % 8 of 16 bytes; odd rows swap the halves of their
  // span, so that two neighbouring rows of a chunk lie in different banks.
  const int copied_row = lane / 8, copied_unit = lane % 8;
  const int64_t row_bytes = static_cast<int64_t>(a.chunks) * kChunkBytes;
  const uint32_t copy_to = shared_address(ring) + copied_row * kSpanBytes + (copied_unit ^ (copied_row & 1) * 4) * 16;
  int next_tile = block, next_chunk = first_chunk, next_slot = 0;
  const int end_chunk = first_chunk + 2 * spans_a_warp;
  const auto first_row = [&](int tile, int r) { return silu ? tile * kTileRows + r * half : (tile * R + r) * kTileRows; };
  const auto end_row = [&](int r) { return silu ? half + r * half : a.rows; };
  const auto load = [&] {
    if (next_tile < a.tiles) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int row = first_row(next_tile, r) + copied_row;
        const char* from = a.weight + row * row_bytes + next_chunk * kChunkBytes + copied_unit * 16;
        const bool whole = next_chunk + copied_unit / 4 < a.chunks;
#pragma unroll
        for (int i = 0; i < 4; i++)
          copy_once(copy_to + next_slot * V::kStageBytes + (r * 4 + i) * 4 * kSpanBytes, from + i * 4 * row_bytes,
                    whole && row + 4 * i < end_row(r), policy);
      }
      if constexpr (FORMAT != MMM_WEIGHT_PLAIN) {
        uint32_t* const to = scale_ring + next_slot * V::kScales + lane;
        const int row = first_row(next_tile, lane / kTileRows) + lane % kTileRows;
        const bool valid = lane < V::kScales && row < end_row(lane / kTileRows);
        if (FORMAT == MMM_WEIGHT_INT8) {
          if (valid && next_chunk + 2 == end_chunk) copy_word(shared_address(to), static_cast<const float*>(a.scales) + row);
        } else {
          const int64_t index = static_cast<int64_t>(row) * a.chunks + next_chunk;
          if (!valid || next_chunk >= a.chunks) {
          } else if (a.chunks % 2 == 0) {
            copy_word(shared_address(to), static_cast<const unsigned short*>(a.scales) + index);
          } else {  // two scales that are no aligned word
            *to = load_16_bits(a.scales, index) | (next_chunk + 1 < a.chunks ? load_16_bits(a.scales, index + 1) << 16 : 0);
          }
        }
      }
      next_chunk += 2;
      if (next_chunk == end_chunk) next_chunk = first_chunk, next_tile += blocks;
    }
    commit_copies();
    next_slot = next_slot + 1 == a.depth ? 0 : next_slot + 1;
  };
  for (int u = 0; u < a.depth; u++) load();
  uint4 first_norm = make_uint4(0, 0, 0, 0);
  if (a.norm_weight != nullptr && tid < a.chunks * 4 * V::kPieces) first_norm = static_cast<const uint4*>(a.norm_weight)[tid];
  if (a.overlap) wait_for_previous_kernel();

  // Which output this thread will write after tile number `turn` of the block; a different warp each time.
  const int columns = silu ? half : a.rows, rows_a_tile = silu ? kTileRows : R * kTileRows;
  const auto place_of = [&](int tile, int turn, int& row, int& token) {
    const int e = (tid + V::kThreads - turn % WARPS * 32) & (V::kThreads - 1);
    row = tile * rows_a_tile + e % rows_a_tile, token = e / rows_a_tile;
    return token < M && row < columns;
  };
  const auto residual_of = [&](int tile, int turn) {
    int row, token;
    if (a.residual == nullptr || tile >= a.tiles || !place_of(tile, turn, row, token)) return 0.f;
    return to_float(static_cast<const Element*>(a.residual)[static_cast<int64_t>(token) * a.out_stride + row]);
  };
  float residual = residual_of(block, 0);
  if constexpr (FEW) {
    const bool one_batch = a.chunks * 4 * V::kPieces <= V::kThreads;
    if (M == 1 && one_batch) stage_rows<V, Element, 1, 1>(a, staged, partial, chunk_sums, first_norm);
    else if (M == 1) stage_rows<V, Element, 1, 4>(a, staged, partial, chunk_sums, first_norm);
    else stage_rows<V, Element, 2, 2>(a, staged, partial, chunk_sums, first_norm);
  } else {
    stage_rows<V, Element, 8, 1>(a, staged, partial, chunk_sums, first_norm);
  }

  // Two sums of everything, so that a matrix instruction waits for the one before the last.
  float sum[2][R][4] = {};
  const uint4* const own_x = staged + min(g, M - 1) * 4 + t;
  // Multiplies CHUNKS chunks of a slot, from its chunk `which` on, whose inputs begin at chunk `chunk` of x.
  const auto consume = [&](int slot, int chunk, int which, auto chunks) {
    constexpr int CHUNKS = decltype(chunks)::value;
    const uint4* const x = own_x + chunk * V::kPieces * M * 4;
    uint4 weights[CHUNKS][R][2];
    float part[CHUNKS][2][R][4], offset[CHUNKS][2][4];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const uint4* const from =
          reinterpret_cast<const uint4*>(ring + slot * V::kStageBytes) + g * 8 + (((which + c) ^ (g & 1)) * 4 + t);
#pragma unroll
      for (int r = 0; r < R; r++) weights[c][r][0] = from[r * 128], weights[c][r][1] = from[r * 128 + 64];
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          offset[c][k][i] = 0.f;
#pragma unroll
          for (int r = 0; r < R; r++) part[c][k][r][i] = 0.f;
        }
      if constexpr (V::kChunkSums) {  // of tokens 2 t and 2 t + 1
        const float2 x_sum = *reinterpret_cast<const float2*>(chunk_sums + (chunk + c) * 8 + 2 * t);
        offset[c][0][0] = offset[c][0][2] = V::kMinus * x_sum.x;
        offset[c][0][1] = offset[c][0][3] = V::kMinus * x_sum.y;
      }
    }
#pragma unroll
    for (int piece = 0; piece < V::kPieces; piece++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const uint4 b = x[(c * V::kPieces + piece) * M * 4];
        if constexpr (V::kOffset && !V::kChunkSums) {  // kMinus times the sum of x, once for all rows
          constexpr uint32_t kPair = 0xc308c308u;      // kMinus, kMinus
          const uint32_t minus[4] = {kPair, kPair, kPair, kPair};
          Matrix<Element>::multiply(R == 1 ? part[c][0][0] : offset[c][0], minus, b.x, b.y);
          Matrix<Element>::multiply(R == 1 ? part[c][1][0] : offset[c][1], minus, b.z, b.w);
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          uint32_t low[4], high[4];
          if constexpr (V::kOffset) {
            V::Format::expand_with_offset(weights[c][r][0], piece, low);
            V::Format::expand_with_offset(weights[c][r][1], piece, high);
          } else {
            V::Format::expand(weights[c][r][0], piece, low);
            V::Format::expand(weights[c][r][1], piece, high);
          }
          const uint32_t a0[4] = {low[0], high[0], low[1], high[1]}, a1[4] = {low[2], high[2], low[3], high[3]};
          Matrix<Element>::multiply(FORMAT == MMM_WEIGHT_INT4 ? part[c][0][r] : sum[0][r], a0, b.x, b.y);
          Matrix<Element>::multiply(FORMAT == MMM_WEIGHT_INT4 ? part[c][1][r] : sum[1][r], a1, b.z, b.w);
        }
      }
    if constexpr (FORMAT == MMM_WEIGHT_INT4) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint32_t both = scale_ring[slot * V::kScales + r * kTileRows + g + 8 * h];
            const float scale = scale_of(which + c == 0 ? both & 0xffffu : both >> 16, a.scales_are_bfloat16);
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; i++) {
              float value = part[c][0][r][i] + part[c][1][r][i];
              if (V::kChunkSums) value += offset[c][0][i];
              else if (V::kOffset && R > 1) value += offset[c][0][i] + offset[c][1][i];
              sum[0][r][i] = fmaf(scale, value, sum[0][r][i]);
            }
          }
    }
  };

  // Adds the warps' sums of a tile and writes its outputs. One barrier: the buffer of the tile before is free by then.
  int turn = 0;
  const auto finish = [&](int tile) {
    float* const buffer = sums + turn % 2 * V::sum_floats(M);
    float* const mine = buffer + warp * R * M * kSumStride;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = 2 * t + i % 2;
        if (token < M) mine[(r * M + token) * kSumStride + g + i / 2 * 8] = sum[0][r][i] + sum[1][r][i];
        sum[0][r][i] = sum[1][r][i] = 0.f;
      }
    __syncthreads();
    int row, token;
    if (place_of(tile, turn, row, token)) {
      const int in_tile = row - tile * rows_a_tile;
      const auto total = [&](int r) {
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += buffer[((w * R + r) * M + token) * kSumStride + in_tile % kTileRows];
        return value;
      };
      float value = total(silu ? 0 : in_tile / kTileRows);
      if (silu && R == 2) value = __fdividef(value, 1.f + __expf(fminf(-value, 80.f))) * total(R - 1);
      value += residual;
      const int64_t index = static_cast<int64_t>(token) * a.out_stride + row;
      if (a.out_is_float32)
        static_cast<float*>(a.out)[index] = value;
      else
        static_cast<Element*>(a.out)[index] = from_float<Element>(value);
    }
    turn++;
    residual = residual_of(tile + blocks, turn);
  };

  int chunk = first_chunk, slot = 0;
  for (int tile = block; tile < a.tiles;) {
    wait_for_oldest(a.depth);
    __syncwarp();
    if (chunk + 1 < a.chunks && R == 1) {
      consume(slot, chunk, 0, std::integral_constant<int, R == 1 ? 2 : 1>());
    } else {
      if (chunk < a.chunks) consume(slot, chunk, 0, std::integral_constant<int, 1>());
      if (chunk + 1 < a.chunks) consume(slot, chunk + 1, 1, std::integral_constant<int, 1>());
    }
    chunk += 2;
    const bool last = chunk == end_chunk;
    if (FORMAT == MMM_WEIGHT_INT8 && last) {
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float scale = __uint_as_float(scale_ring[slot * V::kScales + r * kTileRows + g + i / 2 * 8]);
          sum[0][r][i] *= scale, sum[1][r][i] *= scale;
        }
    }
    __syncwarp();
    load();
    slot = slot + 1 == a.depth ? 0 : slot + 1;
    if (last) {
      finish(tile);
      chunk = first_chunk, tile += blocks;
    }
  }
}

template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 8 ? 3 : 1) linear_vector_kernel(const __grid_constant__ VectorArgs a) {
  linear_vector<Element, FORMAT, WARPS, R, FEW>(a, blockIdx.x, gridDim.x);
}

// The same, and in the first blocks, a tile each, the few rows that are kept in 16 bits.
template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 8 ? 3 : 1)
    linear_vector_kept_kernel(const __grid_constant__ VectorArgs a, const __grid_constant__ VectorArgs kept) {
  if (static_cast<int>(blockIdx.x) < kept.tiles)
    linear_vector<Element, MMM_WEIGHT_PLAIN, WARPS, 1, FEW>(kept, blockIdx.x, kept.tiles);
  else
    linear_vector<Element, FORMAT, WARPS, R, FEW>(a, blockIdx.x - kept.tiles, gridDim.x - kept.tiles);
}

}  // namespace mmm
