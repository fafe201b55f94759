// out = epilogue(norm(x) W^T) for up to 8 rows of x, by the bytes of W alone: each weight is read once, 16 bytes a thread, and goes
// from the load into a matrix instruction (m16n8k16), whose 16 rows are rows of W and whose 8 columns are rows of x. So 8 rows cost what
// one costs, and the integer formats take one to two instructions a weight.
//
//   grid   a few blocks a multiprocessor; block b takes tiles b, b + blocks, ... of R x 16 rows of W (SiLU: R = 2, gate and up)
//   block  WARPS warps share K: warp w takes neighbouring chunks of 64 bytes of every row; sums meet in shared memory, once a tile
//   warp   a load takes 16 bytes of lane l's quarter l % 4 of the chunk, from rows l / 4 and l / 4 + 8
//   ring   DEPTH chunks of a warp are under way, across tiles; those of the first tiles before the previous kernel has ended (overlap),
//          which on a chain of small products hides most of their latency
//   shared x in the order of the fragments, M x K x 2 bytes, normalised; two buffers of partial sums
#pragma once

#include "linear_weights.cuh"
#include "matrix.cuh"
#include "types.cuh"

namespace mmm {

struct VectorArgs {
  const char* weight;
  const void* scales;
  const void *x, *norm_weight, *residual;
  void* out;
  int64_t x_stride;
  int rows, chunks, tokens, tiles;  // N, K / inputs of a chunk, M
  int epilogue;
  float eps;
  bool scales_are_bfloat16, out_is_float32, overlap;
};

constexpr int kTileRows = 16, kChunkBytes = 64;
constexpr int kSumStride = 20;  // of a token's 16 sums: the four lanes of a row then write to four different sets of banks

template <typename Element, int FORMAT, int WARPS, int R, bool RAW>
struct Vector {
  using Format = Weights<Element, FORMAT>;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kDepth = 8 / R;                      // chunks under way: 16 loads of 16 bytes a thread
  static constexpr int kPieces = Format::kInputs / 8;       // 16-byte pieces of x for 16 bytes of weights
  static constexpr bool kRaw = RAW && FORMAT == MMM_WEIGHT_INT4;
  static constexpr bool kScaled = FORMAT != MMM_WEIGHT_PLAIN;

  struct Stage {
    uint4 weights[R][2];
    uint32_t scales[kScaled ? R : 1][2];
  };

  static __host__ __device__ int sum_floats(int tokens) { return WARPS * R * tokens * kSumStride; }
  static int shared_bytes(int tokens, int chunks) {
    const int x = 4 * kPieces * chunks * tokens * 16, offsets = kRaw ? chunks * 8 * 4 : 0;
    return x + offsets + 2 * sum_floats(tokens) * 4 + WARPS * 8 * 4;
  }
};

__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint4 load_once(const char* address, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address), "l"(policy));
  return v;
}

__device__ __forceinline__ uint32_t load_16_bits(const void* base, int64_t index) {
  unsigned short v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(static_cast<const unsigned short*>(base) + index));
  return v;
}

__device__ __forceinline__ uint32_t load_32_bits(const void* base, int64_t index) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(static_cast<const uint32_t*>(base) + index));
  return v;
}

template <typename Element>
__device__ __forceinline__ float sum_of_squares(const uint4& v) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = ElementTraits<Element>::unpack(word_of(v, i));
    sum = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum));
  }
  return sum;
}

// round(round(x * scale) * weight), eight at a time.
template <typename Element>
__device__ __forceinline__ uint4 normalised(const uint4& v, const uint4& weight, float scale) {
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = ElementTraits<Element>::unpack(word_of(v, i)), w = ElementTraits<Element>::unpack(word_of(weight, i));
    const float2 r = ElementTraits<Element>::unpack(ElementTraits<Element>::pack(x.x * scale, x.y * scale));
    out[i] = ElementTraits<Element>::pack(r.x * w.x, r.y * w.y);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Brings x into shared memory, normalised, in the order of the fragments: piece j of 4 x 8 inputs, token, quarter.
template <class V, typename Element>
__device__ __forceinline__ void stage_x(const VectorArgs& a, uint4* staged, float* offsets, float* partial, const uint4& first_norm) {
  constexpr int P = V::kPieces;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, M = a.tokens, eighths = a.chunks * 4 * P;
  const auto* x = static_cast<const Element*>(a.x);
  const auto row = [&](int m) { return reinterpret_cast<const uint4*>(x + m * a.x_stride); };
  if (a.norm_weight != nullptr) {
    for (int m = 0; m < M; m++) {
      float sum = 0.f;
      for (int i = tid; i < eighths; i += V::kThreads) sum += sum_of_squares<Element>(row(m)[i]);
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == 0) partial[warp * 8 + m] = sum;
    }
    __syncthreads();
  }
  for (int m = 0; m < M; m++) {
    float scale = 0.f;
    if (a.norm_weight != nullptr) {
      for (int w = 0; w < V::kThreads / 32; w++) scale += partial[w * 8 + m];
      scale = rsqrtf(scale / static_cast<float>(8 * eighths) + a.eps);
    }
    for (int i = tid; i < eighths; i += V::kThreads) {
      uint4 v = row(m)[i];
      if (a.norm_weight != nullptr)
        v = normalised<Element>(v, i == tid ? first_norm : reinterpret_cast<const uint4*>(a.norm_weight)[i], scale);
      const int chunk = i / (4 * P), quarter = i % (4 * P) / P, piece = i % P;
      staged[((chunk * P + piece) * M + m) * 4 + quarter] = V::Format::ordered(v);
      if constexpr (V::kRaw) {  // 16 neighbouring threads hold a chunk, which is a group
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 pair = ElementTraits<Element>::unpack(word_of(v, j));
          sum += pair.x + pair.y;
        }
#pragma unroll
        for (int o = 8; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffu << (lane & 16), sum, o);
        constexpr float kOffset = sizeof(Element) == 2 && Magic<Element>::kBits == 0x43004300u ? 136.f : 1032.f;
        if ((lane & 15) == 0) offsets[chunk * 8 + m] = -kOffset * sum;
      }
    }
  }
  __syncthreads();
}

template <typename Element, int FORMAT, int WARPS, int R, bool RAW>
__global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) linear_vector_kernel(const __grid_constant__ VectorArgs a) {
  using V = Vector<Element, FORMAT, WARPS, R, RAW>;
  extern __shared__ __align__(16) uint4 shared[];
  const int M = a.tokens;
  uint4* const staged = shared;
  float* const offsets = reinterpret_cast<float*>(staged + 4 * V::kPieces * a.chunks * M);
  float* const sums = offsets + (V::kRaw ? a.chunks * 8 : 0);
  float* const partial = sums + 2 * V::sum_floats(M);

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int chunks_a_warp = (a.chunks + WARPS - 1) / WARPS, first_chunk = warp * chunks_a_warp;
  const int own = min(a.chunks - first_chunk, chunks_a_warp);  // less than 1 for warps that K leaves without work
  const bool silu = a.epilogue == MMM_EPILOGUE_SILU;
  const int half = a.rows / 2;
  const uint64_t policy = read_once_policy();
  if (a.overlap) let_next_kernel_start();

  // The ring of chunks under way.
  typename V::Stage ring[V::kDepth];
  const char* address[R][2];
  int scale_index[R][2];
  int next_tile = blockIdx.x, next_chunk = 0;
  const auto point_at = [&](int tile) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int place = (silu ? tile : tile * R + r) * kTileRows + g + 8 * h;
        const int row = silu ? min(place, half - 1) + r * half : min(place, a.rows - 1);
        address[r][h] = a.weight + (static_cast<int64_t>(row) * a.chunks + first_chunk) * kChunkBytes + t * 16;
        scale_index[r][h] = FORMAT == MMM_WEIGHT_INT4 ? row * a.chunks + first_chunk : row;
      }
  };
  const auto load = [&](typename V::Stage& stage) {
    if (next_tile >= a.tiles) return;
    const bool used = next_chunk < own;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (used) stage.weights[r][h] = load_once(address[r][h] + next_chunk * kChunkBytes, policy);
        if (FORMAT == MMM_WEIGHT_INT4 && used) stage.scales[r][h] = load_16_bits(a.scales, scale_index[r][h] + next_chunk);
        if (FORMAT == MMM_WEIGHT_INT8 && next_chunk + 1 == chunks_a_warp)
          stage.scales[r][h] = load_32_bits(a.scales, scale_index[r][h]);
      }
    if (++next_chunk == chunks_a_warp) {
      next_chunk = 0, next_tile += gridDim.x;
      point_at(next_tile);
    }
  };
  point_at(next_tile);
#pragma unroll
  for (int u = 0; u < V::kDepth; u++) load(ring[u]);
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
    return to_float(static_cast<const Element*>(a.residual)[static_cast<int64_t>(token) * columns + row]);
  };
  float residual = residual_of(blockIdx.x, 0);
  stage_x<V, Element>(a, staged, offsets, partial, first_norm);

  float sum[R][4] = {};
  const uint4* const own_x = staged + (first_chunk * V::kPieces * M + min(g, M - 1)) * 4 + t;
  const auto consume = [&](const typename V::Stage& stage, int chunk) {
    const uint4* const x = own_x + chunk * V::kPieces * M * 4;
    float even[R][4], odd[R][4];
    if constexpr (FORMAT == MMM_WEIGHT_INT4) {
      float2 start = make_float2(0.f, 0.f);
      if (V::kRaw) start = *reinterpret_cast<const float2*>(offsets + (first_chunk + chunk) * 8 + 2 * t);
#pragma unroll
      for (int r = 0; r < R; r++) {
        even[r][0] = even[r][2] = start.x, even[r][1] = even[r][3] = start.y;
#pragma unroll
        for (int i = 0; i < 4; i++) odd[r][i] = 0.f;
      }
    }
#pragma unroll
    for (int piece = 0; piece < V::kPieces; piece++) {
      const uint4 b = x[piece * M * 4];
#pragma unroll
      for (int r = 0; r < R; r++) {
        uint32_t low[4], high[4];
        if constexpr (V::kRaw) {
          V::Format::template expand_as<true>(stage.weights[r][0], piece, low);
          V::Format::template expand_as<true>(stage.weights[r][1], piece, high);
        } else {
          V::Format::expand(stage.weights[r][0], piece, low);
          V::Format::expand(stage.weights[r][1], piece, high);
        }
        const uint32_t a0[4] = {low[0], high[0], low[1], high[1]}, a1[4] = {low[2], high[2], low[3], high[3]};
        if constexpr (FORMAT == MMM_WEIGHT_INT4) {
          Matrix<Element>::multiply(even[r], a0, b.x, b.y);
          Matrix<Element>::multiply(odd[r], a1, b.z, b.w);
        } else {
          Matrix<Element>::multiply(sum[r], a0, b.x, b.y);
          Matrix<Element>::multiply(sum[r], a1, b.z, b.w);
        }
      }
    }
    if constexpr (FORMAT == MMM_WEIGHT_INT4) {
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[r][i] = fmaf(scale_of(stage.scales[r][i / 2], a.scales_are_bfloat16), even[r][i] + odd[r][i], sum[r][i]);
    }
  };

  // Adds the warps' sums of a tile and writes its outputs. One barrier: the buffer of the tile before is free by then.
  int turn = 0;
  const auto finish = [&](const uint32_t (&scales)[V::kScaled ? R : 1][2], int tile) {
    float* const buffer = sums + turn % 2 * V::sum_floats(M);
    float* const mine = buffer + warp * R * M * kSumStride;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float value = sum[r][i];
        if (FORMAT == MMM_WEIGHT_INT8) value *= __uint_as_float(scales[r][i / 2]);
        const int token = 2 * t + i % 2;
        if (token < M) mine[(r * M + token) * kSumStride + g + i / 2 * 8] = value;
        sum[r][i] = 0.f;
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
      const int64_t index = static_cast<int64_t>(token) * columns + row;
      if (a.out_is_float32)
        static_cast<float*>(a.out)[index] = value;
      else
        static_cast<Element*>(a.out)[index] = from_float<Element>(value);
    }
    turn++;
    residual = residual_of(tile + gridDim.x, turn);
  };

  int tile = blockIdx.x, chunk = 0;
  while (tile < a.tiles) {
#pragma unroll
    for (int u = 0; u < V::kDepth; u++) {
      if (tile >= a.tiles) break;
      if (chunk < own) consume(ring[u], chunk);
      const typename V::Stage used = ring[u];
      load(ring[u]);
      if (++chunk == chunks_a_warp) {
        finish(used.scales, tile);
        chunk = 0, tile += gridDim.x;
      }
    }
  }
}

}  // namespace mmm
