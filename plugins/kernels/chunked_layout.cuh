// Sizes, arguments and shared memory of the chunked scan.
#pragma once

#include <stdint.h>

#include "mmm/kernels.h"

namespace mmm {

constexpr int kChunk = 64;  // tokens scanned together by matrix products

// Arguments of a kernel, the same for all blocks.
struct ChunkedArgs {
  const void* projected;  // rows [v | k | q | gate | dt]
  int64_t batch_stride, token_stride;
  const int32_t* lengths;
  const void *conv_state, *ssm_state;
  const float *conv_weight, *conv_bias, *dt_bias, *A_log, *norm_weight;
  void *y, *conv_state_out, *ssm_state_out;
  float* segment_states;  // (B, H, segments, P, N): after pass 1 what each segment adds, after pass 2 its start state
  float* segment_decays;  // (B, H, segments): log2 of the decay over a segment
  int tokens, heads, kv_heads, conv_width, state_dtype;
  int segments, segment_tokens;  // pieces of a sequence; tokens of each, a multiple of kChunk
  float eps;

  __device__ __forceinline__ int length(int batch) const {
    return lengths == nullptr ? tokens : min(max(lengths[batch], 0), tokens);
  }
};

// Where in a 128 x 128 state the first two of four entries belong that lie together in a segment's state of chunked_hopper.cuh; the
// other two are eight rows below. There, and so in memory, 256 threads have 16 such fours each: `four` / 256 is a thread's own number.
__device__ __forceinline__ int fragment_entry(int four) {
  const int warp = four % 256 / 32, lane = four % 32;
  return (warp * 16 + lane / 4) * 128 + four / 256 * 8 + lane % 4 * 2;
}

// What the 64 deltas of a chunk mean.
struct Decays {
  float decay[kChunk];    // log2 of the decay from the chunk's start to after token t
  float arrival[kChunk];  // decay - log2(delta): token t adds exp2(decay[i] - arrival[t]) v_t k_t^T to the state at i
  float weight[kChunk];   // the same at the chunk's end
};

// D = head_dim = state_dim. A block serves HEADS heads of one kv head; TAPS is the conv width rounded up to 2 or 4.
template <typename Element, int D_, int HEADS_, int TAPS_, bool STATE_ONLY_>
struct Chunked {
  static constexpr int D = D_, HEADS = HEADS_, TAPS = TAPS_, HALO = TAPS_ - 1;
  static constexpr bool STATE_ONLY = STATE_ONLY_;
  // A warp owns BANDS bands of 16 rows of its head's state. Two would halve the reads of shared memory, but leave half the warps to
  // hide its latency: 164 us instead of 146 for 8,192 tokens on an H200.
  static constexpr int BANDS = 1;
  static constexpr int WARPS = D / (16 * BANDS);
  static constexpr int COLUMNS = 2 * BANDS;         // 8-column fragments of y, and 16-byte units of a gate row, that a warp owns
  static constexpr int HEAD_THREADS = 32 * WARPS;
  static constexpr int THREADS = HEADS * HEAD_THREADS;
  static constexpr int UNITS = D / 8;               // 16-byte units of a row
  static constexpr int ROWS = kChunk / (HEAD_THREADS / UNITS);  // rows of a tile that a thread convolves
  static constexpr int PITCH = D + 8;               // padded row of a tile: 8 rows of an ldmatrix hit 8 different banks
  static constexpr int MASK_PITCH = kChunk + 8;
  static constexpr bool STAGED = HEADS > 1;         // raw rows are prefetched to shared memory; else to registers
  static constexpr int TILES = STATE_ONLY ? 2 : 2 + HEADS;  // k, v, q of each head

  struct Head {
    Element q[STATE_ONLY ? 1 : kChunk][PITCH];
    Element mask[STATE_ONLY ? 1 : kChunk][MASK_PITCH];       // (q k^T) decayed, below the diagonal
    uint4 gate[STATE_ONLY ? 1 : WARPS][STATE_ONLY ? 1 : kChunk][COLUMNS];  // each warp's columns, units swizzled
    float squares[STATE_ONLY ? 1 : kChunk][WARPS];           // each warp's part of a row's sum of squares
    Decays decays;
  };
  struct Shared {
    Element k[kChunk][PITCH], v[kChunk][PITCH];
    Head head[HEADS];
    float4 taps[TAPS + 1][TILES][2][UNITS];        // conv weights and, last, the bias, of half a unit; halved for silu_of_double
    uint4 raw[STAGED ? TILES : 1][STAGED ? kChunk + HALO : 1][STAGED ? UNITS : 1];
  };
};

}  // namespace mmm
