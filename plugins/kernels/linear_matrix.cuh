// The same products for many rows of x (prefill): a plain tiled matrix product that expands integer weights on their way into shared
// memory. Meant to be right and a fair speed, not to rival cuBLAS.
//
//   grid   (N / 128, M / 64): a block makes 128 rows of W by 64 tokens; SiLU: 64 rows of gate and the 64 of up that go with them
//   block  8 warps, each 32 rows by 32 tokens in m16n8k16; SiLU: a warp's first 16 rows are gate, the other 16 up
//   loop   64 inputs a turn: the next turn's weights and x wait in registers while this one's are multiplied from shared memory
#pragma once

#include "linear_vector.cuh"

namespace mmm {

struct MatrixArgs {
  const char* weight;
  const void* scales;
  const void *x, *residual;
  void* out;
  int64_t x_stride, tokens, out_stride;  // out_stride: of out and residual
  int rows, inputs, epilogue;
  bool scales_are_bfloat16, out_is_float32;
};

constexpr int kBlockRows = 128, kBlockTokens = 64, kBlockInputs = 64, kMatrixThreads = 256;
constexpr int kPitch = kBlockInputs + 8;  // of a row in shared memory: ldmatrix then meets no bank twice

template <typename Element, int FORMAT>
__global__ void __launch_bounds__(kMatrixThreads) linear_matrix_kernel(const __grid_constant__ MatrixArgs a) {
  using Format = Weights<Element, FORMAT>;
  constexpr int kLoadsARow = kBlockInputs / Format::kInputs, kLoads = kBlockRows * kLoadsARow / kMatrixThreads;
  constexpr int kXLoads = kBlockTokens * kBlockInputs / 8 / kMatrixThreads;
  __shared__ __align__(16) Element weights[kBlockRows][kPitch];
  __shared__ __align__(16) Element tokens[kBlockTokens][kPitch];

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int warp_row = warp % 4 * 32, warp_token = warp / 4 * 32;
  const bool silu = a.epilogue == MMM_EPILOGUE_SILU;
  const int half = a.rows / 2;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kBlockTokens;
  // The row of W that is row `i` of the block, or one past the last of its part.
  const auto row_of = [&](int i) {
    if (!silu) return min(static_cast<int>(blockIdx.x) * kBlockRows + i, a.rows);
    const int place = static_cast<int>(blockIdx.x) * (kBlockRows / 2) + i / 32 * 16 + i % 16;
    return min(place, half) + (i % 32 < 16 ? 0 : half);
  };
  const int64_t row_bytes = static_cast<int64_t>(a.inputs) / Format::kInputs * 16;

  uint4 next_weights[kLoads], next_x[kXLoads];
  const auto load = [&](int k) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int slot = tid + i * kMatrixThreads, at = k + slot % kLoadsARow * Format::kInputs;
      const int row = min(row_of(slot / kLoadsARow), a.rows - 1);
      next_weights[i] = make_uint4(0, 0, 0, 0);
      if (at < a.inputs)
        next_weights[i] = __ldg(reinterpret_cast<const uint4*>(a.weight + row * row_bytes + at / Format::kInputs * 16));
    }
#pragma unroll
    for (int i = 0; i < kXLoads; i++) {
      const int slot = tid + i * kMatrixThreads, at = k + slot % 8 * 8;
      const int64_t token = first_token + slot / 8;
      next_x[i] = make_uint4(0, 0, 0, 0);  // past the last input both sides are finite, and this side is zero
      if (at < a.inputs && token < a.tokens)
        next_x[i] = *reinterpret_cast<const uint4*>(static_cast<const Element*>(a.x) + token * a.x_stride + at);
    }
  };
  const auto store = [&] {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int slot = tid + i * kMatrixThreads;
      Element* const to = &weights[slot / kLoadsARow][slot % kLoadsARow * Format::kInputs];
#pragma unroll
      for (int piece = 0; piece < Format::kInputs / 8; piece++) {
        uint32_t pairs[4];
        Format::expand(next_weights[i], piece, pairs);
        *reinterpret_cast<uint4*>(to + 8 * piece) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kXLoads; i++) {
      const int slot = tid + i * kMatrixThreads;
      *reinterpret_cast<uint4*>(&tokens[slot / 8][slot % 8 * 8]) = Format::ordered(next_x[i]);
    }
  };

  float sum[2][4][4] = {};
  load(0);
  for (int k = 0; k < a.inputs; k += kBlockInputs) {
    store();
    __syncthreads();
    if (k + kBlockInputs < a.inputs) load(k + kBlockInputs);
    float part[2][4][4] = {};
    float(&into)[2][4][4] = FORMAT == MMM_WEIGHT_INT4 ? part : sum;
#pragma unroll
    for (int at = 0; at < kBlockInputs; at += 16) {
      uint32_t w[2][4], x[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        load_matrices(w[i], shared_address(&weights[warp_row + 16 * i + lane % 16][at + lane / 16 * 8]));
        load_matrices(x[i], shared_address(&tokens[warp_token + 16 * i + lane % 8 + lane / 16 * 8][at + lane / 8 % 2 * 8]));
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) Matrix<Element>::multiply(into[i][j], w[i], x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
    }
    if constexpr (FORMAT == MMM_WEIGHT_INT4) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = min(row_of(warp_row + 16 * i + 8 * h + g), a.rows - 1);
          const int64_t group = static_cast<int64_t>(row) * (a.inputs / MMM_INT4_GROUP) + k / MMM_INT4_GROUP;
          const float scale = scale_of(load_16_bits(a.scales, group), a.scales_are_bfloat16);
#pragma unroll
          for (int j = 0; j < 4; j++) {
            sum[i][j][2 * h] = fmaf(scale, part[i][j][2 * h], sum[i][j][2 * h]);
            sum[i][j][2 * h + 1] = fmaf(scale, part[i][j][2 * h + 1], sum[i][j][2 * h + 1]);
          }
        }
    }
    __syncthreads();
  }

  const int64_t columns = silu ? half : a.rows;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = row_of(warp_row + 16 * i + 8 * h + g);
      float scale = 1.f, up_scale = 1.f;
      if (FORMAT == MMM_WEIGHT_INT8) {
        scale = static_cast<const float*>(a.scales)[min(row, a.rows - 1)];
        if (silu && i == 0) up_scale = static_cast<const float*>(a.scales)[min(row + half, a.rows - 1)];
      }
      if (row >= columns || (silu && i == 1)) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int64_t token = first_token + warp_token + j / 2 * 8 + 2 * t + j % 2;
        if (token >= a.tokens) continue;
        float value = scale * sum[i][j / 2][2 * h + j % 2];
        if (silu) value = __fdividef(value, 1.f + __expf(fminf(-value, 80.f))) * (up_scale * sum[1][j / 2][2 * h + j % 2]);
        const int64_t index = token * a.out_stride + row;
        if (a.residual != nullptr) value += to_float(static_cast<const Element*>(a.residual)[index]);
        if (a.out_is_float32)
          static_cast<float*>(a.out)[index] = value;
        else
          static_cast<Element*>(a.out)[index] = from_float<Element>(value);
      }
    }
}

// Normalised rows for the kernel above: a block a row, K a multiple of 8.
template <typename Element>
__global__ void __launch_bounds__(256) linear_norm_kernel(const Element* x, int64_t x_stride, const Element* weight, Element* out,
                                                          int inputs, float eps) {
  __shared__ float partial[8];
  const int tid = threadIdx.x, eighths = inputs / 8;
  const auto* row = reinterpret_cast<const uint4*>(x + blockIdx.x * x_stride);
  float sum = 0.f;
  for (int i = tid; i < eighths; i += 256) sum += sum_of_squares<Element>(row[i]);
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (tid % 32 == 0) partial[tid / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < 8; w++) sum += partial[w];
  const float scale = rsqrtf(sum / static_cast<float>(inputs) + eps);
  auto* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(blockIdx.x) * inputs);
  for (int i = tid; i < eighths; i += 256)
    to[i] = normalised<Element>(row[i], reinterpret_cast<const uint4*>(weight)[i], scale);
}

// Integer weights to `Element`, rounded, eight inputs a thread: what a product that knows no such weights reads.
template <typename Element, int FORMAT>
__global__ void __launch_bounds__(256) linear_widen_kernel(const char* weight, const void* scales, uint4* out, int64_t eighths,
                                                           int inputs, bool scales_are_bfloat16) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= eighths) return;
  const int64_t row = i / (inputs / 8);
  float values[8], scale;
  if constexpr (FORMAT == MMM_WEIGHT_INT8) {
    scale = static_cast<const float*>(scales)[row];
    const uint2 bytes = reinterpret_cast<const uint2*>(weight)[i];
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = static_cast<float>(static_cast<signed char>((j < 4 ? bytes.x : bytes.y) >> (j % 4 * 8)));
  } else {
    const int group = static_cast<int>(i % (inputs / 8)) * 8 / MMM_INT4_GROUP;
    scale = scale_of(load_16_bits(scales, row * (inputs / MMM_INT4_GROUP) + group), scales_are_bfloat16);
    const uint32_t nibbles = reinterpret_cast<const uint32_t*>(weight)[i];
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = static_cast<float>(static_cast<int>(nibbles >> (4 * j) & 15u) - 8);
  }
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; j++) words[j] = ElementTraits<Element>::pack(values[2 * j] * scale, values[2 * j + 1] * scale);
  out[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

// out (M, N/2) = silu(gate) * up of products (M, N), each row [gate | up]; a thread makes eight columns. Both factors are rounded first,
// as they lie in memory here.
template <typename Element>
__global__ void __launch_bounds__(256) linear_silu_kernel(const Element* products, void* out, int64_t eighths, int columns,
                                                          bool out_is_float32) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= eighths) return;
  const int64_t token = i / (columns / 8);
  const int64_t column = i % (columns / 8) * 8;
  const Element* const row = products + token * 2 * columns;
  const uint4 gate = *reinterpret_cast<const uint4*>(row + column), up = *reinterpret_cast<const uint4*>(row + columns + column);
  float y[8];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float2 g = ElementTraits<Element>::unpack(word_of(gate, j)), u = ElementTraits<Element>::unpack(word_of(up, j));
    y[2 * j] = silu(g.x) * u.x, y[2 * j + 1] = silu(g.y) * u.y;
  }
  const int64_t at = token * columns + column;
  if (out_is_float32) {
#pragma unroll
    for (int j = 0; j < 8; j++) static_cast<float*>(out)[at + j] = y[j];
  } else {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = ElementTraits<Element>::pack(y[2 * j], y[2 * j + 1]);
    *reinterpret_cast<uint4*>(static_cast<Element*>(out) + at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace mmm
