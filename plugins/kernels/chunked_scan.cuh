// The chunked scan of one segment: state-space duality (Mamba-2, arXiv 2405.21060), 64 tokens at a time.
//
// grid (segments, H / HEADS, B), 32 * P/16 threads a head. A block walks its segment; warp w of a head owns rows 16w..16w+15 of the
// state for all of N, as P/16-row accumulators in registers, where they also are, packed, the right operand of y = q S^T.
// Per chunk: conv + SiLU of k, v, q; M = (q k^T) decayed; y = decay (q S^T) + M v; S = decay S + (w v)^T k; gated RMS norm.
// STATE_ONLY (pass 1) keeps S alone, from k and v. Bytes a token and head pair at P = N = 128, 16 bit: 2,048 in, 512 out; pass 1
// reads 512 more. Needs token_stride and the pointers to be multiples of 16 bytes.
#pragma once

#include "chunked_rows.cuh"
#include "chunked_state.cuh"

namespace mmm {

template <typename Element, class C>
struct ChunkedScan {
  using Shared = typename C::Shared;
  using M = Matrix<Element>;
  static constexpr int D = C::D, WARPS = C::WARPS, BANDS = C::BANDS, COLUMNS = C::COLUMNS;

  const ChunkedArgs& args;
  Shared& shared;
  typename C::Head& own;
  Place place;
  int group, warp, lane, row, column;  // row = lane / 4 and column = 2 * (lane % 4): place in an 8x8 fragment
  int head, channels;
  float raw_dt[2];         // of tokens 2 * lane and 2 * lane + 1 of a chunk to come, in warp 0 of the head
  float S[BANDS][D / 8][4];  // state: rows 16 * (BANDS * warp + m) + row (+8), columns 8 * j + column (+1)
  float total;             // log2 of the decay since the segment's start

  __device__ __forceinline__ ChunkedScan(const ChunkedArgs& args, Shared& shared)
      : args(args), shared(shared), own(shared.head[threadIdx.x / C::HEAD_THREADS]), total(0.f) {
    group = threadIdx.x / C::HEAD_THREADS;
    warp = threadIdx.x % C::HEAD_THREADS / 32;
    lane = threadIdx.x % 32;
    row = lane / 4, column = 2 * (lane % 4);
    place.batch = blockIdx.z, place.segment = blockIdx.x, place.head = blockIdx.y * C::HEADS;
    place.kv = place.head / (args.heads / args.kv_heads);
    place.length = args.length(place.batch);
    place.begin = place.segment * args.segment_tokens;
    place.end = min(place.begin + args.segment_tokens, place.length);
    head = place.head + group;
    channels = (2 * args.kv_heads + args.heads) * D;
  }

  __device__ __forceinline__ void head_barrier() const {
    if constexpr (C::HEADS == 1)
      __syncthreads();
    else
      barrier(1 + group, C::HEAD_THREADS);
  }

  __device__ __forceinline__ int64_t state_index() const {
    return (static_cast<int64_t>(place.batch) * args.heads + head) * D * D + (warp * 16 * BANDS + row) * D + column;
  }
  __device__ __forceinline__ int64_t segment_index() const {
    return ((static_cast<int64_t>(place.batch) * args.heads + head) * args.segments + place.segment) * D * D +
           (warp * 16 * BANDS + row) * D + column;
  }

  __device__ __forceinline__ void load(const void* state, int dtype, int64_t index) {
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const int64_t at = index + m * 16 * D + j * 8;
        const float2 upper = load_state(state, dtype, at), lower = load_state(state, dtype, at + 8 * D);
        S[m][j][0] = upper.x, S[m][j][1] = upper.y, S[m][j][2] = lower.x, S[m][j][3] = lower.y;
      }
  }
  __device__ __forceinline__ void store(void* state, int dtype, int64_t index) const {
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const int64_t at = index + m * 16 * D + j * 8;
        store_state(state, dtype, at, S[m][j][0], S[m][j][1]);
        store_state(state, dtype, at + 8 * D, S[m][j][2], S[m][j][3]);
      }
  }

  __device__ __forceinline__ void prefetch_dt(int begin) {
    if (warp != 0) return;
    const Element* rows = static_cast<const Element*>(args.projected) + place.batch * args.batch_stride + channels +
                          args.heads * D + head;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = begin + 2 * lane + i;
      raw_dt[i] = t < place.length ? float(rows[t * args.token_stride]) : __int_as_float(0xff800000);  // -inf: no token, delta 0
    }
  }

  // delta of the chunk's 64 tokens, two a lane, and their decays summed up: log2 of the decay since the chunk's start.
  __device__ __forceinline__ void prepare_decays() {
    if (warp != 0) return;
    const float bias = args.dt_bias[head], rate = -expf(args.A_log[head]) * 1.4426950408889634f;
    float delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = raw_dt[i] + bias;
      delta[i] = x > 20.f ? x : log1pf(expf(x));
    }
    const float first = delta[0] * rate, both = first + delta[1] * rate;
    float sum = both;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const float before = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += before;
    }
    const float end = __shfl_sync(~0u, sum, 31);
    const float2 decay = make_float2(sum - both + first, sum);
    const float2 arrival = make_float2(decay.x - __log2f(delta[0]), decay.y - __log2f(delta[1]));
    *reinterpret_cast<float2*>(&own.decays.decay[2 * lane]) = decay;
    *reinterpret_cast<float2*>(&own.decays.arrival[2 * lane]) = arrival;
    *reinterpret_cast<float2*>(&own.decays.weight[2 * lane]) =
        make_float2(exp2_fast(end - arrival.x), exp2_fast(end - arrival.y));
  }

  // own.mask = (q k^T) decayed: 16x16 blocks on and below the diagonal, spread over the warps so that each quarter of a processor
  // has as many. A warp's blocks are j0, j0 + 1, .. of row i0; the upper half of 8 warps, or the second head, goes backwards.
  __device__ __forceinline__ void mask_product() {
    const bool upper = WARPS == 8 ? warp >= 4 : group == 1;
    const int i0 = upper ? WARPS - 1 - warp : warp, j0 = WARPS == 8 && upper ? 2 : 0;
    const int blocks = min(i0 + 1 - j0, WARPS == 8 ? 2 : 4);
    if (blocks == 1) mask_blocks<1>(i0, j0);
    if (blocks == 2) mask_blocks<2>(i0, j0);
    if constexpr (WARPS == 4) {
      if (blocks == 3) mask_blocks<3>(i0, j0);
      if (blocks == 4) mask_blocks<4>(i0, j0);
    }
  }

  template <int BLOCKS>
  __device__ __forceinline__ void mask_blocks(int i0, int j0) {
    float m[BLOCKS][2][4] = {};
    const uint32_t left = shared_address(&own.q[i0 * 16 + lane % 16][lane / 16 * 8]);
    const uint32_t right = shared_address(&shared.k[j0 * 16 + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      uint32_t a[4];
      load_matrices(a, left + kk * 32);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        uint32_t f[4];
        load_matrices(f, right + b * 32 * C::PITCH + kk * 32);
        M::multiply(m[b][0], a, f[0], f[1]), M::multiply(m[b][1], a, f[2], f[3]);
      }
    }
    const int i = i0 * 16 + row;
    const float upper = own.decays.decay[i], lower = own.decays.decay[i + 8];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int j = (j0 + b) * 16 + n * 8 + column;
        const float2 arrival = *reinterpret_cast<const float2*>(&own.decays.arrival[j]);
        float w00 = m[b][n][0] * exp2_fast(upper - arrival.x), w01 = m[b][n][1] * exp2_fast(upper - arrival.y);
        float w10 = m[b][n][2] * exp2_fast(lower - arrival.x), w11 = m[b][n][3] * exp2_fast(lower - arrival.y);
        if (b == BLOCKS - 1) {  // only a row's last block lies on the diagonal
          w00 = j <= i ? w00 : 0.f, w01 = j + 1 <= i ? w01 : 0.f;
          w10 = j <= i + 8 ? w10 : 0.f, w11 = j + 1 <= i + 8 ? w11 : 0.f;
        }
        *reinterpret_cast<uint32_t*>(&own.mask[i][j]) = M::pack(w00, w01);
        *reinterpret_cast<uint32_t*>(&own.mask[i + 8][j]) = M::pack(w10, w11);
      }
  }

  // y = decay (q S^T): 64 tokens x this warp's columns. The accumulators of S are, packed, the right operand: no data moves.
  __device__ __forceinline__ void read_state(float (&y)[4][COLUMNS][4]) const {
    const uint32_t left = shared_address(&own.q[lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) y[i][n][0] = y[i][n][1] = y[i][n][2] = y[i][n][3] = 0.f;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      uint32_t b[COLUMNS][2];
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int k = 0; k < 2; k++) b[n][k] = M::pack(S[n / 2][2 * kk + k][n % 2 * 2], S[n / 2][2 * kk + k][n % 2 * 2 + 1]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        load_matrices(a, left + (i * 16 * C::PITCH + kk * 16) * 2);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) M::multiply(y[i][n], a, b[n][0], b[n][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float upper = exp2_fast(own.decays.decay[i * 16 + row]), lower = exp2_fast(own.decays.decay[i * 16 + row + 8]);
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) y[i][n][0] *= upper, y[i][n][1] *= upper, y[i][n][2] *= lower, y[i][n][3] *= lower;
    }
  }

  // y += M v
  __device__ __forceinline__ void add_within_chunk(float (&y)[4][COLUMNS][4]) const {
    const uint32_t left = shared_address(&own.mask[lane % 16][lane / 16 * 8]);
    const uint32_t right = shared_address(&shared.v[lane % 16][warp * 16 * BANDS + lane / 16 * 8]);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      uint32_t f[BANDS][4];
#pragma unroll
      for (int m = 0; m < BANDS; m++) load_matrices_transposed(f[m], right + (kk * 16 * C::PITCH + m * 16) * 2);
#pragma unroll
      for (int i = kk; i < 4; i++) {
        uint32_t a[4];
        load_matrices(a, left + (i * 16 * C::MASK_PITCH + kk * 16) * 2);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) M::multiply(y[i][n], a, f[n / 2][n % 2 * 2], f[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  // S = decay S + (weight v)^T k
  __device__ __forceinline__ void update_state() {
    const float end = own.decays.decay[kChunk - 1], decay = exp2_fast(end);
    total += end;
    const uint32_t left = shared_address(&shared.v[lane % 8 + lane / 16 * 8][warp * 16 * BANDS + lane / 8 % 2 * 8]);
    const uint32_t right = shared_address(&shared.k[lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
      for (int j = 0; j < D / 8; j++) S[m][j][0] *= decay, S[m][j][1] *= decay, S[m][j][2] *= decay, S[m][j][3] *= decay;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      uint32_t a[BANDS][4];
      const float2 w0 = *reinterpret_cast<const float2*>(&own.decays.weight[kk * 16 + column]);
      const float2 w1 = *reinterpret_cast<const float2*>(&own.decays.weight[kk * 16 + 8 + column]);
#pragma unroll
      for (int m = 0; m < BANDS; m++) {
        load_matrices_transposed(a[m], left + (kk * 16 * C::PITCH + m * 16) * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 v = M::unpack(a[m][e]), w = e < 2 ? w0 : w1;
          a[m][e] = M::pack(v.x * w.x, v.y * w.y);
        }
      }
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        uint32_t f[4];
        load_matrices_transposed(f, right + (kk * 16 * C::PITCH + j * 16) * 2);
#pragma unroll
        for (int m = 0; m < BANDS; m++) M::multiply(S[m][2 * j], a[m], f[0], f[1]), M::multiply(S[m][2 * j + 1], a[m], f[2], f[3]);
      }
    }
  }

  // This warp's columns of the gate, in units of 8. Lane l serves unit l % COLUMNS of rows l / COLUMNS, + SWEEP, ...
  // Units are swapped between rows so that a fragment's 8 rows lie in different banks.
  static constexpr int SWEEP = 32 / COLUMNS;
  __device__ __forceinline__ uint4* gate_unit(int r, int unit) const {
    return &own.gate[warp][r][unit ^ (BANDS == 2 ? r >> 1 & 3 : r >> 2 & 1)];
  }

  __device__ __forceinline__ void prefetch_gate(int begin) {
    const Element* rows = static_cast<const Element*>(args.projected) + place.batch * args.batch_stride + channels +
                          (begin + lane / COLUMNS) * args.token_stride + head * D + warp * 16 * BANDS + lane % COLUMNS * 8;
    const uint32_t target = shared_address(gate_unit(lane / COLUMNS, lane % COLUMNS));
#pragma unroll
    for (int i = 0; i < kChunk / SWEEP; i++)
      copy_async(target + i * SWEEP * COLUMNS * 16, rows + i * SWEEP * args.token_stride, begin + i * SWEEP + lane / COLUMNS < place.length);
  }

  __device__ __forceinline__ void sum_squares(const float (&y)[4][COLUMNS][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float upper = 0.f, lower = 0.f;
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        upper += y[i][n][0] * y[i][n][0] + y[i][n][1] * y[i][n][1];
        lower += y[i][n][2] * y[i][n][2] + y[i][n][3] * y[i][n][3];
      }
      upper += __shfl_xor_sync(~0u, upper, 1), upper += __shfl_xor_sync(~0u, upper, 2);
      lower += __shfl_xor_sync(~0u, lower, 1), lower += __shfl_xor_sync(~0u, lower, 2);
      if (column == 0) own.squares[i * 16 + row][warp] = upper, own.squares[i * 16 + row + 8][warp] = lower;
    }
  }

  // Gated RMS norm of y, written through the gate's place in shared memory so that rows leave in whole sectors.
  __device__ __forceinline__ void write(const float (&y)[4][COLUMNS][4], int begin) {
    float scale[2];  // of rows lane and lane + 32
#pragma unroll
    for (int s = 0; s < 2; s++) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w += 4) {
        const float4 part = *reinterpret_cast<const float4*>(&own.squares[lane + 32 * s][w]);
        sum += part.x + part.y + part.z + part.w;
      }
      scale[s] = rsqrtf(sum * (1.f / D) + args.eps);
    }
    float2 norm[COLUMNS];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
      norm[n] = __ldg(reinterpret_cast<const float2*>(args.norm_weight + warp * 16 * BANDS + n * 8 + column));
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float s = __shfl_sync(~0u, scale[i / 2], i % 2 * 16 + half * 8 + row);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
          uint32_t* word = reinterpret_cast<uint32_t*>(gate_unit(i * 16 + half * 8 + row, n)) + column / 2;
          const float2 gate = M::unpack(*word);
          *word = M::pack(y[i][n][2 * half] * s * norm[n].x * silu_of_double<Element>(0.5f * gate.x),
                          y[i][n][2 * half + 1] * s * norm[n].y * silu_of_double<Element>(0.5f * gate.y));
        }
      }
    __syncwarp();
    const int64_t pitch = args.heads * D;
    Element* out = static_cast<Element*>(args.y) +
                   (static_cast<int64_t>(place.batch) * args.tokens + begin + lane / COLUMNS) * pitch + head * D +
                   warp * 16 * BANDS + lane % COLUMNS * 8;
    const uint4* const done = gate_unit(lane / COLUMNS, lane % COLUMNS);
#pragma unroll
    for (int i = 0; i < kChunk / SWEEP; i++)
      if (begin + i * SWEEP + lane / COLUMNS < args.tokens)
        *reinterpret_cast<uint4*>(out + i * SWEEP * pitch) = done[i * SWEEP * COLUMNS];
    __syncwarp();
  }

  // Rows of y past this row's length, as far as no chunk of this segment has written them.
  __device__ __forceinline__ void clear_padding(int begin) {
    const int end = min(place.begin + args.segment_tokens, args.tokens);
    for (int i = begin * C::UNITS + threadIdx.x % C::HEAD_THREADS; i < end * C::UNITS; i += C::HEAD_THREADS) {
      Element* out = static_cast<Element*>(args.y) +
                     (static_cast<int64_t>(place.batch) * args.tokens + i / C::UNITS) * args.heads * D + head * D;
      *reinterpret_cast<uint4*>(out + i % C::UNITS * 8) = make_uint4(0, 0, 0, 0);
    }
  }

  // The last K-1 raw rows; of the heads that share k and v the first writes those.
  __device__ __forceinline__ void write_conv_state() {
    const int kept = args.conv_width - 1, first_head = place.kv * (args.heads / args.kv_heads);
    for (int i = threadIdx.x; i < C::TILES * D; i += C::THREADS) {
      const int tile = i / D, channel = tile_channel<C>(args, place, tile) + i % D;
      if (tile < 2 && place.head != first_head) continue;
      Element* out = static_cast<Element*>(args.conv_state_out) +
                     (static_cast<int64_t>(place.batch) * channels + channel) * kept;
      for (int j = 0; j < kept; j++)
        out[j] = raw_element<Element>(args, place.batch, channels, channel, place.length - kept + j);
    }
  }
};

}  // namespace mmm
