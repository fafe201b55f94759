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

#include "chunked_scan.cuh"
#include "warpgroup.cuh"

namespace mmm {

// What the 64 deltas of a chunk mean, as Decays; two chunks' lie in shared memory.
struct alignas(16) ChunkDecays {
  float decay[kChunk], arrival[kChunk], weight[kChunk];
  float from_start[kChunk];  // exp2(decay)
  float end;                 // decay[kChunk - 1]
};

template <typename Element, bool STATE_ONLY_>
struct Warpgroups {
  static constexpr bool STATE_ONLY = STATE_ONLY_, STAGED = true;
  static constexpr int D = 128, HEADS = 2, TAPS = 2, HALO = 1, BANDS = 1, COLUMNS = 2;
  static constexpr int WARPS = 8, HEAD_THREADS = 256, THREADS = 512, UNITS = 16;
  static constexpr int TILES = STATE_ONLY ? 2 : 4;      // k, v, q of each head
  static constexpr int STAGES = STATE_ONLY ? 2 : 1;     // of raw rows and tiles
  static constexpr int ROWS = kChunk * TILES / 16;      // rows that a thread convolves
  static constexpr int TILE_BYTES = 2 * kChunk * kTileRow;

  struct Tile {
    uint4 units[TILE_BYTES / 16];  // two swizzled tiles of 64 columns
  };
  struct Head {
    ChunkDecays decays[2];
    float squares[STATE_ONLY ? 1 : WARPS][STATE_ONLY ? 1 : kChunk];  // each warp's part of a token's sum of squares
    float dt_bias, rate;
  };
  struct Shared {
    Tile tiles[STAGES][TILES];
    uint4 mask[HEADS][STATE_ONLY ? 1 : kChunk * 8];          // (q k^T) decayed, below the diagonal; a swizzled tile
    uint4 gate[2][2 * HEADS][STATE_ONLY ? 1 : kChunk * 8];   // two chunks', each warpgroup's 64 columns; then y
    uint4 raw[STAGES][TILES][kChunk + HALO][UNITS];
    float4 taps[TAPS + 1][TILES][2][UNITS];
    float norm_weight[STATE_ONLY ? 1 : D];
    Head head[HEADS];
  };
};

template <typename Element, class C>
struct WarpgroupScan : ChunkedScan<Element, C> {
  using Base = ChunkedScan<Element, C>;
  using Shared = typename C::Shared;
  using M = Matrix<Element>;
  using W = WarpgroupMatrix<Element>;
  using Base::args, Base::shared, Base::place, Base::group, Base::warp, Base::lane, Base::row, Base::column, Base::head,
      Base::channels, Base::raw_dt, Base::total;
  static constexpr int D = C::D, STAGE_BYTES = sizeof(Shared::raw) / C::STAGES;

  float S[64];  // 4j + e: entry e of the fragment in columns 8j.. of rows 16 * warp + row (+8)
  int across;  // byte offset in a 64-wide tile of the unit that this lane names when 16 x 16 fragments are read across rows

  int thread;

  __device__ __forceinline__ WarpgroupScan(const ChunkedArgs& args, Shared& shared) : Base(args, shared) { locate(); }

  // Derive the thread's place anew. Called in the loop over chunks, so that what follows from it is computed where it is used:
  // the compiler would otherwise do so before the loop, and spill what the registers cannot hold.
  __device__ __forceinline__ void locate() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    lane = thread % 32, warp = thread / 32 % 8, group = thread / 256;
    row = lane / 4, column = lane % 4 * 2, head = place.head + group;
    across = tile_offset(lane % 8 + lane / 16 * 8, warp % 4 * 2 + lane / 8 % 2);
  }

  __device__ __forceinline__ typename C::Head& own() const { return shared.head[group]; }
  __device__ __forceinline__ int warpgroup() const { return warp / 4; }  // of this head
  __device__ __forceinline__ void head_barrier() const { barrier(1 + group, C::HEAD_THREADS); }
  __device__ __forceinline__ void warpgroup_barrier() const { barrier(3 + thread / 128, 128); }

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

  // Start the copies of the next chunk's raw rows, and of the row before it; zeros past the row's length.
  __device__ __forceinline__ void copy_rows(int number) const {
    const int unit = thread % C::UNITS, r = thread / C::UNITS, begin = place.begin + number * kChunk;
    const int left = place.length - begin - r;
    const uint32_t stage = shared_address(&shared.raw[0][0][0][unit]) + number % C::STAGES * STAGE_BYTES;
    const int pitch = static_cast<int>(args.token_stride) * 2;  // bytes
    const char* const base = static_cast<const char*>(args.projected) +
                             (place.batch * args.batch_stride + static_cast<int64_t>(begin) * args.token_stride) * 2 + unit * 16;
    const char *const upper = base + r * pitch, *const lower = upper + 32 * pitch;
#pragma unroll
    for (int tile = 0; tile < C::TILES; tile++) {
      const int offset = tile_channel<C>(args, place, tile) * 2;
      const uint32_t target = stage + (tile * (kChunk + 1) + 1 + r) * C::UNITS * 16;
      copy_async(target, upper + offset, 0 < left);
      copy_async(target + 32 * C::UNITS * 16, lower + offset, 32 < left);
    }
    if (r >= C::TILES) return;
    if (begin == 0)
      shared.raw[0][r][0][unit] = raw_unit<Element>(args, place.batch, channels, tile_channel<C>(args, place, r) + unit * 8, -1);
    else
      copy_async(stage + r * (kChunk + 1) * C::UNITS * 16, base - pitch + tile_channel<C>(args, place, r) * 2, true);
  }

  // delta of the chunk whose dt were prefetched, two tokens a lane, and their decays summed up; warp 0 of the head.
  __device__ __forceinline__ void prepare_decays(ChunkDecays& decays) {
    if (warp != 0) return;
    const float bias = own().dt_bias, rate = own().rate;
    float delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = raw_dt[i] + bias;
      delta[i] = x > 20.f ? x : log1pf(__expf(x));
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
    *reinterpret_cast<float2*>(&decays.decay[2 * lane]) = decay;
    *reinterpret_cast<float2*>(&decays.arrival[2 * lane]) = arrival;
    *reinterpret_cast<float2*>(&decays.weight[2 * lane]) = make_float2(exp2_fast(end - arrival.x), exp2_fast(end - arrival.y));
    *reinterpret_cast<float2*>(&decays.from_start[2 * lane]) = make_float2(exp2_fast(decay.x), exp2_fast(decay.y));
    if (lane == 0) decays.end = end;
  }

  // Convolve the chunk: a quarter (pass 1: half) of the threads make one tile, 4 channels of ROWS rows each.
  __device__ __forceinline__ void convolve(int stage) const {
    constexpr int TILE_THREADS = C::THREADS / C::TILES;
    const int tile = thread / TILE_THREADS, local = thread % TILE_THREADS;
    const int unit = local % 32 / 2, half = local % 2, first = local / 32 * C::ROWS;
    float taps[3][4], before[4];
#pragma unroll
    for (int tap = 0; tap < 3; tap++) *reinterpret_cast<float4*>(taps[tap]) = shared.taps[tap][tile][half][unit];
    const uint2* const raw = reinterpret_cast<const uint2*>(&shared.raw[stage][tile][first][unit]) + half;
    unsigned char* const target =
        reinterpret_cast<unsigned char*>(&shared.tiles[stage][tile]) + unit / 8 * kChunk * kTileRow + half * 8;
#pragma unroll
    for (int r = 0; r <= C::ROWS; r++) {
      const uint2 packed = raw[r * C::UNITS * 2];
      const float2 low = M::unpack(packed.x), high = M::unpack(packed.y);
      const float current[4] = {low.x, low.y, high.x, high.y};
      if (r > 0) {
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = silu_of_double(fmaf(taps[1][i], current[i], fmaf(taps[0][i], before[i], taps[2][i])));
        *reinterpret_cast<uint2*>(target + tile_offset(first + r - 1, unit % 8)) =
            make_uint2(M::pack(sum[0], sum[1]), M::pack(sum[2], sum[3]));
      }
#pragma unroll
      for (int i = 0; i < 4; i++) before[i] = current[i];
    }
  }

  // M = (q k^T) o decays: the 32 columns of this warpgroup into the head's mask. Meanwhile warp 0 prepares the next chunk's decays.
  __device__ __forceinline__ void mask_product(const ChunkDecays& decays, int number) {
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
    prepare_next(number);
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
      const float2 d = *reinterpret_cast<const float2*>(&decays.from_start[n * 8 + column]);
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

  // This thread's 16-byte units of the gate's tile, and of y: unit threadIdx % 8 of rows threadIdx % 128 / 8, + 16, ...
  __device__ __forceinline__ uint4* gate_unit(int number) const {
    const int t = thread % 128;
    return &shared.gate[number % 2][thread / 128][t / 8 * 8 + (t % 8 ^ (t / 8 & 7))];
  }
  __device__ __forceinline__ void copy_gate(int number) const {
    const int r = thread % 128 / 8, begin = place.begin + number * kChunk, left = place.length - begin - r;
    const int pitch = static_cast<int>(args.token_stride) * 2;  // bytes
    const char* const from = static_cast<const char*>(args.projected) +
                             (place.batch * args.batch_stride + static_cast<int64_t>(begin) * args.token_stride) * 2 + r * pitch +
                             (channels + head * D + warpgroup() * 64 + thread % 8 * 8) * 2;
    const uint32_t target = shared_address(gate_unit(number));
#pragma unroll
    for (int i = 0; i < 4; i++) copy_async(target + i * 16 * kTileRow, from + i * 16 * pitch, i * 16 < left);
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
        fragment[e] = M::pack(y[4 * n + 2 * (e % 2)] * s0 * weight * silu_of_double(0.5f * gate.x),
                              y[4 * n + 2 * (e % 2) + 1] * s1 * weight * silu_of_double(0.5f * gate.y));
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

  __device__ __forceinline__ bool more_than(int number) const { return place.begin + number * kChunk < place.end; }

  // Decays of the chunk after `number`, and the dt of the one after that.
  __device__ __forceinline__ void prepare_next(int number) {
    if (!more_than(number + 1)) return;
    prepare_decays(own().decays[(number + 1) % 2]);
    this->prefetch_dt(place.begin + (number + 2) * kChunk);
  }

  // The start of everything: dt of the first two chunks, taps, weights.
  __device__ __forceinline__ void prepare() {
    this->prefetch_dt(place.begin);
    load_taps<C>(shared, args, place);
    if (!C::STATE_ONLY && thread < D) shared.norm_weight[thread] = args.norm_weight[thread];
    if (warp != 0) return;
    own().dt_bias = args.dt_bias[head], own().rate = -expf(args.A_log[head]) * 1.4426950408889634f;
    __syncwarp();
    prepare_decays(own().decays[0]);
    this->prefetch_dt(place.begin + kChunk);
  }

  // Tiles of the chunk whose raw rows were copied before the last PENDING groups of copies.
  template <int PENDING>
  __device__ __forceinline__ void make_tiles(int stage) {
    wait_copies<PENDING>();
    locate();
    __syncthreads();   // ... everybody's; and the tiles that the convolution writes are no longer read
    convolve(stage);
    publish_to_matrix_units();
    __syncthreads();
  }

  // y of the chunk whose tiles are ready, and the state after it.
  __device__ __forceinline__ void output(int number) {
    locate();
    const ChunkDecays& decays = own().decays[number % 2];
    float y[32];
    mask_product(decays, number);
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
    const bool cut = args.segments > 1;
    load_start(cut ? args.segment_states : args.ssm_state, cut ? MMM_FLOAT32 : args.state_dtype,
               cut ? this->segment_index() : this->state_index());
    store_end(args.ssm_state_out, args.state_dtype, this->state_index());
    this->write_conv_state();
  }

  __device__ __forceinline__ void store_segment() const {
    store_end(args.segment_states, MMM_FLOAT32, this->segment_index());
    if (warp == 0 && lane == 0)
      args.segment_decays[(static_cast<int64_t>(place.batch) * args.heads + head) * args.segments + place.segment] = total;
  }

  __device__ __forceinline__ void clear_state() {
#pragma unroll
    for (int i = 0; i < 64; i++) S[i] = 0.f;
  }
};

}  // namespace mmm
