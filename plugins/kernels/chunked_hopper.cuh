// The chunked scan on the warpgroup matrix units of sm_90a: P = N = 128, conv width 2, 16-bit types, two heads of one kv head.
//
// grid (segments, H/2, B), 512 threads = 4 warpgroups, 128 registers a thread. Warpgroup w of a head owns rows 64w..64w+63 of its
// state for all of N, as 64 float32 accumulators a thread. Everything is computed transposed, so that these accumulators, packed,
// are the left operand of y^T = S q^T: the state never passes through shared memory. Per chunk of 64 tokens:
//   all           conv + SiLU of k, v and both q: raw rows (cp.async, one chunk ahead) -> swizzled 16-bit tiles
//   warpgroup     M = (q k^T) decayed, its 32 columns;  y^T = S q^T, decayed, + v^T M^T;  S = decay S + (w v)^T k
//                 gated RMS norm in y^T's fragments: the gate is read, and y written, by transposing matrix moves
// STATE_ONLY (pass 1) keeps S alone, from k and v, with two stages of raw rows and of tiles.
// Bytes a token and pair of heads: 2,048 in, 512 out; pass 1 reads 1,024 more. Shared memory 224 KB, pass 1 136 KB: one block a
// processor. H100, bfloat16, 103,000 tokens: 1,155 us; the kernels of chunked_scan.cuh took 1,465 in a separate run.
// Binds (8,192 tokens): 1,850 instructions a warp and chunk at an issue rate near 0.3 to 0.4, waits at barriers, and some 10 us of
// prologue and state traffic in each pass.
#pragma once

#include "chunked_hopper_rows.cuh"

namespace mmm {

template <typename Element, class C>
struct WarpgroupScan : WarpgroupRows<Element, C> {
  using Base = WarpgroupRows<Element, C>;
  using Shared = typename C::Shared;
  using M = Matrix<Element>;
  using W = WarpgroupMatrix<Element>;
  using Base::args, Base::shared, Base::place, Base::group, Base::warp, Base::lane, Base::row, Base::column, Base::head,
      Base::total, Base::thread, Base::across;
  using Base::own, Base::warpgroup, Base::head_barrier, Base::warpgroup_barrier, Base::locate, Base::gate_unit, Base::copy_rows,
      Base::copy_gate, Base::more_than;
  static constexpr int D = C::D;

  float S[64];  // 4j + e: entry e of the fragment in columns 8j.. of rows 16 * warp + row (+8)

  using Base::Base;

  // The loops are written out for float32: a choice of type for each element would be 64 branches.
  __device__ __forceinline__ void load_start(const void* state, int dtype, int64_t index) {
    if (dtype == MMM_FLOAT32) {
      const float2* const from = reinterpret_cast<const float2*>(static_cast<const float*>(state) + index);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const float2 upper = __ldcg(from + j * 4), lower = __ldcg(from + j * 4 + 4 * D);
        S[4 * j] = upper.x, S[4 * j + 1] = upper.y, S[4 * j + 2] = lower.x, S[4 * j + 3] = lower.y;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float2 upper = load_state(state, dtype, index + j * 8), lower = load_state(state, dtype, index + j * 8 + 8 * D);
      S[4 * j] = upper.x, S[4 * j + 1] = upper.y, S[4 * j + 2] = lower.x, S[4 * j + 3] = lower.y;
    }
  }
  __device__ __forceinline__ void store_end(void* state, int dtype, int64_t index) const {
    if (dtype == MMM_FLOAT32) {
      float2* const to = reinterpret_cast<float2*>(static_cast<float*>(state) + index);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        to[j * 4] = make_float2(S[4 * j], S[4 * j + 1]);
        to[j * 4 + 4 * D] = make_float2(S[4 * j + 2], S[4 * j + 3]);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
      store_state(state, dtype, index + j * 8, S[4 * j], S[4 * j + 1]);
      store_state(state, dtype, index + j * 8 + 8 * D, S[4 * j + 2], S[4 * j + 3]);
    }
  }

  // M = (q k^T) o decays: the 32 columns of this warpgroup into the head's mask.
  __device__ __forceinline__ void mask_product(const ChunkDecays& decays) {
    float m[16] = {};
    const uint64_t q = tile_descriptor(shared_address(&shared.tiles[0][2 + group]));
    const uint64_t k = tile_descriptor(shared_address(&shared.tiles[0][0]) + warpgroup() * 32 * kTileRow);
    begin_products();
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      const int step = (kk / 4 * kChunk * kTileRow + kk % 4 * 32) >> 4;
      W::tiles_32(m, q + step, k + step, kk > 0);
    }
    commit_products();
    wait_products<0>();
    pin(m);
    const int i = warp % 4 * 16 + row;
    const float upper = decays.decay[i], lower = decays.decay[i + 8];
    const uint32_t target = shared_address(&shared.mask[group]) +
                            tile_offset(warp % 4 * 16 + lane % 16, 0);  // unit 0: rows' swizzle is added below
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      uint32_t packed[4];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int j = warpgroup() * 32 + (2 * pair + n) * 8 + column;
        const float2 arrival = *reinterpret_cast<const float2*>(&decays.arrival[j]);
        const int at = (2 * pair + n) * 4;
        packed[2 * n] = M::pack(j <= i ? m[at] * exp2_fast(upper - arrival.x) : 0.f,
                                j + 1 <= i ? m[at + 1] * exp2_fast(upper - arrival.y) : 0.f);
        packed[2 * n + 1] = M::pack(j <= i + 8 ? m[at + 2] * exp2_fast(lower - arrival.x) : 0.f,
                                    j + 1 <= i + 8 ? m[at + 3] * exp2_fast(lower - arrival.y) : 0.f);
      }
      const int unit = warpgroup() * 4 + pair * 2 + lane / 16;
      store_matrices((target & ~0x70u) | ((unit ^ (lane & 7)) << 4), packed);
    }
    publish_to_matrix_units();
  }

  // y^T = S q^T: 64 of P x 64 tokens. STEPS of the product at a time: more need more registers than there are.
  static constexpr int STEPS = 1;
  __device__ __forceinline__ void read_state(float (&y)[32]) {
    const uint64_t q = tile_descriptor(shared_address(&shared.tiles[0][2 + group]));
#pragma unroll
    for (int first = 0; first < D / 16; first += STEPS) {
      uint32_t a[STEPS][4];
#pragma unroll
      for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int e = 0; e < 4; e++) a[s][e] = M::pack(S[(first + s) * 8 + 2 * e], S[(first + s) * 8 + 2 * e + 1]);
      begin_products();
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int kk = first + s;
        W::held_64(y, a[s], q + ((kk / 4 * kChunk * kTileRow + kk % 4 * 32) >> 4), kk > 0);
      }
      commit_products();
      wait_products<0>();
      pin(y);
    }
  }

  // y^T = decayed y^T + v^T M^T; left under way.
  __device__ __forceinline__ void add_within_chunk(const ChunkDecays& decays, float (&y)[32]) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const float2 decay = *reinterpret_cast<const float2*>(&decays.decay[n * 8 + column]);
      const float2 d = make_float2(exp2_fast(decay.x), exp2_fast(decay.y));
      y[4 * n] *= d.x, y[4 * n + 1] *= d.y, y[4 * n + 2] *= d.x, y[4 * n + 3] *= d.y;
    }
    const uint64_t v = tile_descriptor(shared_address(&shared.tiles[0][1]) + warpgroup() * kChunk * kTileRow);
    const uint64_t mask = tile_descriptor(shared_address(&shared.mask[group]));
    pin(y);
    begin_products();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) W::across_64(y, v + (kk * 16 * kTileRow >> 4), mask + (kk * 32 >> 4));
    commit_products();
  }

  // S = decay S + (weight v)^T k; left under way. The weighted v^T goes into `a`, which must live until it is done.
  __device__ __forceinline__ void update_state(const ChunkDecays& decays, int stage, uint32_t (&a)[4][4]) {
    const float end = decays.end, decay = exp2_fast(end);
    total += end;
#pragma unroll
    for (int i = 0; i < 64; i++) S[i] *= decay;
    const uint32_t v = shared_address(&shared.tiles[stage][1]) + warpgroup() * kChunk * kTileRow + across;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      load_matrices_transposed(a[kk], v + kk * 16 * kTileRow);
      const float2 w0 = *reinterpret_cast<const float2*>(&decays.weight[kk * 16 + column]);
      const float2 w1 = *reinterpret_cast<const float2*>(&decays.weight[kk * 16 + 8 + column]);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 x = M::unpack(a[kk][e]), w = e < 2 ? w0 : w1;
        a[kk][e] = M::pack(x.x * w.x, x.y * w.y);
      }
    }
    const uint64_t k = tile_descriptor(shared_address(&shared.tiles[stage][0]), kChunk * kTileRow);
    pin(S);
    begin_products();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) W::held_across_128(S, a[kk], k + (kk * 16 * kTileRow >> 4));
    commit_products();
  }

  // Of 2 * HALF sums keep those that this lane, and give the others to the one that keeps them.
  template <int HALF>
  __device__ __forceinline__ void halve(float (&s)[16]) const {
    const bool upper = lane & HALF * 2;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float sent = upper ? s[i] : s[i + HALF], kept = upper ? s[i + HALF] : s[i];
      s[i] = kept + __shfl_xor_sync(~0u, sent, HALF * 2);
    }
  }

  // Sum the squares of y over this warp's 16 rows of P. Each step halves the tokens that a lane sums for, until two are left.
  __device__ __forceinline__ void sum_squares(const float (&y)[32]) {
    float s[16];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      s[2 * n] = y[4 * n] * y[4 * n] + y[4 * n + 2] * y[4 * n + 2];
      s[2 * n + 1] = y[4 * n + 1] * y[4 * n + 1] + y[4 * n + 3] * y[4 * n + 3];
    }
    halve<8>(s), halve<4>(s), halve<2>(s);
    *reinterpret_cast<float2*>(&own().squares[warp][2 * lane]) = make_float2(s[0], s[1]);
  }

  // Gated RMS norm of y into the gate's place in shared memory.
  __device__ __forceinline__ void normalize(const float (&y)[32], int number) const {
    float2 scale = make_float2(0.f, 0.f);  // of tokens 2 * lane, + 1
#pragma unroll
    for (int w = 0; w < C::WARPS; w++) {
      const float2 part = *reinterpret_cast<const float2*>(&own().squares[w][2 * lane]);
      scale.x += part.x, scale.y += part.y;
    }
    scale.x = rsqrtf(scale.x * (1.f / D) + args.eps), scale.y = rsqrtf(scale.y * (1.f / D) + args.eps);
    const float upper_weight = shared.norm_weight[warp * 16 + row], lower_weight = shared.norm_weight[warp * 16 + row + 8];
    const uint32_t target = shared_address(&shared.gate[number % 2][thread / 128]) + across;
    float s0 = 0.f, s1 = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t fragment[4];
      load_matrices_transposed(fragment, target + i * 16 * kTileRow);
#pragma unroll
      for (int e = 0; e < 4; e++) {  // e / 2: which 8 tokens; e % 2: which 8 rows of P
        const int n = 2 * i + e / 2;
        if (e % 2 == 0) s0 = __shfl_sync(~0u, scale.x, 4 * n + lane % 4), s1 = __shfl_sync(~0u, scale.y, 4 * n + lane % 4);
        const float weight = e % 2 ? lower_weight : upper_weight;
        const float2 gate = M::unpack(fragment[e]);
        fragment[e] = M::pack(y[4 * n + 2 * (e % 2)] * s0 * weight * silu_of_double<Element>(0.5f * gate.x),
                              y[4 * n + 2 * (e % 2) + 1] * s1 * weight * silu_of_double<Element>(0.5f * gate.y));
      }
      store_matrices_transposed(target + i * 16 * kTileRow, fragment);
    }
  }

  // Whole lines of y, once the warpgroup has normalized its part.
  __device__ __forceinline__ void write(int number) const {
    const int begin = place.begin + number * kChunk;
    const int t = begin + thread % 128 / 8;
    const int64_t pitch = args.heads * D;
    Element* out = static_cast<Element*>(args.y) + (static_cast<int64_t>(place.batch) * args.tokens + t) * pitch + head * D +
                   warpgroup() * 64 + thread % 8 * 8;
    const uint4* const done = gate_unit(number);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (t + i * 16 < args.tokens) *reinterpret_cast<uint4*>(out + i * 16 * pitch) = done[i * 16 * 8];
  }

  // y of the chunk whose tiles are ready, and the state after it.
  __device__ __forceinline__ void output(int number) {
    locate();
    const ChunkDecays& decays = own().decays[number % C::AHEAD];
    float y[32];
    mask_product(decays);
    locate();
    if (more_than(number + 1)) copy_rows(number + 1), copy_gate(number + 1);
    locate();
    commit_copies();
    read_state(y);
    head_barrier();  // both halves of the mask are there
    add_within_chunk(decays, y);
    wait_products<0>();
    pin(y);
    sum_squares(y);
    locate();
    head_barrier();
    normalize(y, number);
    locate();
    uint32_t weighted[4][4];
    update_state(decays, 0, weighted);
    warpgroup_barrier();
    locate();
    write(number);
    wait_products<0>();
    pin(S);
  }

  // After the last chunk of this segment.
  __device__ __forceinline__ void finish() {
    this->clear_padding(place.begin + (place.end - place.begin + kChunk - 1) / kChunk * kChunk);
    if (place.end != place.length) return;
    store_end(args.ssm_state_out, args.state_dtype, this->state_index());
    this->write_conv_state();
  }
  // Where nothing of this segment is valid. Start states are there.
  __device__ __forceinline__ void finish_empty() {
    this->clear_padding(place.begin);
    if (place.segment > 0) return;
    if (args.segments > 1)
      load_segment();
    else
      load_start(args.ssm_state, args.state_dtype, this->state_index());
    store_end(args.ssm_state_out, args.state_dtype, this->state_index());
    this->write_conv_state();
  }

  // Of this segment in the workspace, in the order of fragment_entry: a warp writes and reads whole lines.
  __device__ __forceinline__ float4* segment_state() const {
    const int64_t segment = (static_cast<int64_t>(place.batch) * args.heads + head) * args.segments + place.segment;
    return reinterpret_cast<float4*>(args.segment_states + segment * D * D) + thread % C::HEAD_THREADS;
  }
  __device__ __forceinline__ void load_segment() {
    const float4* const from = segment_state();
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float4 four = __ldcg(from + j * C::HEAD_THREADS);
      S[4 * j] = four.x, S[4 * j + 1] = four.y, S[4 * j + 2] = four.z, S[4 * j + 3] = four.w;
    }
  }
  __device__ __forceinline__ void store_segment() const {
    float4* const to = segment_state();
#pragma unroll
    for (int j = 0; j < 16; j++)
      to[j * C::HEAD_THREADS] = make_float4(S[4 * j], S[4 * j + 1], S[4 * j + 2], S[4 * j + 3]);
    if (warp == 0 && lane == 0)
      args.segment_decays[(static_cast<int64_t>(place.batch) * args.heads + head) * args.segments + place.segment] = total;
  }

  __device__ __forceinline__ void clear_state() {
#pragma unroll
    for (int i = 0; i < 64; i++) S[i] = 0.f;
  }
};

}  // namespace mmm
