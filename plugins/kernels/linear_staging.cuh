// Rows of x on their way into shared memory, for linear_vector.cuh: normalised, and in the order of the matrix instructions' fragments.
#pragma once

#include "linear_weights.cuh"
#include "types.cuh"

namespace mmm {

struct VectorArgs {
  const char* weight;
  const void* scales;
  const void *x, *norm_weight, *residual;
  void* out;
  int64_t x_stride;
  int rows, chunks, tokens, tiles;  // N, K / inputs of a chunk, M
  int out_stride;                   // elements of out and residual from token to token
  int epilogue, depth;
  float eps;
  bool scales_are_bfloat16, out_is_float32, overlap;
};

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

template <typename Element>
__device__ __forceinline__ float sum_of(const uint4& v) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = ElementTraits<Element>::unpack(word_of(v, i));
    sum += pair.x + pair.y;
  }
  return sum;
}

// Writes the sum of a chunk of x, whose eighths lie with neighbouring lanes; a lane holds eighth `i`, or zeros.
template <class V, typename Element>
__device__ __forceinline__ void store_chunk_sum(float* chunk_sums, int i, int eighths, int token, const uint4& v) {
  float sum = sum_of<Element>(v);
#pragma unroll
  for (int o = 2 * V::kPieces; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (i < eighths && i % (4 * V::kPieces) == 0) chunk_sums[i / (4 * V::kPieces) * 8 + token] = sum;
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

// Brings x, of at most MOST rows, into shared memory, normalised, in the order of the fragments: piece j of 4 x 8 inputs, token,
// quarter. BATCH x MOST loads of a thread are under way at once; more than K has would only be more instructions to fetch, which a
// block meets for the first time and which then cost more than what they do.
template <class V, typename Element, int MOST, int BATCH>
__device__ __forceinline__ void stage_rows(const VectorArgs& a, uint4* staged, float* partial, float* chunk_sums,
                                           const uint4& first_norm) {
  constexpr int P = V::kPieces, kBatch = BATCH, WARPS = V::kThreads / 32;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, M = a.tokens, eighths = a.chunks * 4 * P;
  const bool normalise = a.norm_weight != nullptr;
  uint4 v[kBatch][MOST];
  const auto load = [&](int first) {
#pragma unroll
    for (int b = 0; b < kBatch; b++)
#pragma unroll
      for (int m = 0; m < MOST; m++) {
        const int i = first + b * V::kThreads;
        v[b][m] = make_uint4(0, 0, 0, 0);
        if (i < eighths && m < M)
          v[b][m] = reinterpret_cast<const uint4*>(static_cast<const Element*>(a.x) + m * a.x_stride)[i];
      }
  };
  load(tid);
  float scale[MOST];
  if (normalise) {
    float sum[MOST] = {};
    for (int first = tid;;) {
#pragma unroll
      for (int b = 0; b < kBatch; b++)
#pragma unroll
        for (int m = 0; m < MOST; m++) sum[m] += sum_of_squares<Element>(v[b][m]);
      first += kBatch * V::kThreads;
      if (first - tid >= eighths) break;  // the same for all threads
      load(first);
    }
#pragma unroll
    for (int m = 0; m < MOST; m++) {
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) sum[m] += __shfl_xor_sync(~0u, sum[m], o);
      if (lane == 0) partial[m * WARPS + warp] = sum[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MOST; m++) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w += 4) {
        const float4 four = *reinterpret_cast<const float4*>(partial + m * WARPS + w);
        total += (four.x + four.y) + (four.z + four.w);
      }
      scale[m] = rsqrtf(total / static_cast<float>(8 * eighths) + a.eps);
    }
    if (eighths > kBatch * V::kThreads) load(tid);  // else the first batch is the only one
  }
  for (int first = tid;;) {
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int i = first + b * V::kThreads;
      if (i < eighths) {
        const int chunk = i / (4 * P), quarter = i % (4 * P) / P, piece = i % P;
        uint4* const to = staged + (chunk * P + piece) * M * 4 + quarter;
        uint4 weight = first_norm;
        if (normalise && i != tid) weight = static_cast<const uint4*>(a.norm_weight)[i];
#pragma unroll
        for (int m = 0; m < MOST; m++) {
          if (normalise) v[b][m] = normalised<Element>(v[b][m], weight, scale[m]);
          if (m < M) to[m * 4] = V::Format::ordered(v[b][m]);
        }
      }
      if (V::kChunkSums)
#pragma unroll
        for (int m = 0; m < MOST; m++) store_chunk_sum<V, Element>(chunk_sums, i, eighths, m, v[b][m]);
    }
    first += kBatch * V::kThreads;
    if (first - tid >= eighths) break;
    load(first);
  }
  __syncthreads();
}

}  // namespace mmm
