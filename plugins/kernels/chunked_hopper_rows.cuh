// What a block of chunked_hopper.cuh holds, and how it gets its tiles: raw rows and the gate copied one chunk ahead, then conv +
// SiLU into swizzled 16-bit tiles; and the decays of the next chunk.
#pragma once

#include "chunk_decays.cuh"
#include "chunked_scan.cuh"
#include "warpgroup.cuh"

namespace mmm {

template <typename Element, bool STATE_ONLY_>
struct Warpgroups {
  static constexpr bool STATE_ONLY = STATE_ONLY_, STAGED = true;
  static constexpr int D = 128, HEADS = 2, TAPS = 2, HALO = 1, BANDS = 1, COLUMNS = 2;
  static constexpr int WARPS = 8, HEAD_THREADS = 256, THREADS = 512, UNITS = 16;
  static constexpr int TILES = STATE_ONLY ? 2 : 4;      // k, v, q of each head
  static constexpr int STAGES = STATE_ONLY ? 2 : 1;     // of raw rows and tiles
  static constexpr int ROWS = kChunk * TILES / 16;      // rows that a thread convolves
  static constexpr int TILE_BYTES = 2 * kChunk * kTileRow;
  static constexpr int AHEAD = 4;                       // chunks whose decays as many warps of a head work out at once

  struct Tile {
    uint4 units[TILE_BYTES / 16];  // two swizzled tiles of 64 columns
  };
  struct Head {
    ChunkDecays decays[AHEAD];
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
struct WarpgroupRows : ChunkedScan<Element, C> {
  using Base = ChunkedScan<Element, C>;
  using Shared = typename C::Shared;
  using M = Matrix<Element>;
  using Base::args, Base::shared, Base::place, Base::group, Base::warp, Base::lane, Base::row, Base::column, Base::head,
      Base::channels;
  static constexpr int D = C::D, STAGE_BYTES = sizeof(Shared::raw) / C::STAGES;

  int across;  // byte offset in a 64-wide tile of the unit that this lane names when 16 x 16 fragments are read across rows
  int thread;
  float2 next_dt;  // see prefetch_dt

  __device__ __forceinline__ WarpgroupRows(const ChunkedArgs& args, Shared& shared) : Base(args, shared) { locate(); }

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

  // The raw dt that this warp will need for the decays of chunk `number`; of each head AHEAD warps do that.
  __device__ __forceinline__ void prefetch_dt(int number) {
    const int t = place.begin + number * kChunk + 2 * lane;
    if (warp < C::AHEAD) next_dt = load_dt<Element>(args, place.batch, channels + args.heads * D + head, t, place.length);
  }
  // The decays of AHEAD chunks from `number` on, a warp each. One warp needs as long for one as all for the rest of a chunk.
  __device__ __forceinline__ void prepare_decays(int number, float dt_bias, float rate) {
    if (warp >= C::AHEAD) return;
    if (more_than(number + warp)) write_decays(own().decays[warp], next_dt, dt_bias, rate, lane);
    prefetch_dt(number + C::AHEAD + warp);
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
        for (int i = 0; i < 4; i++) sum[i] = silu_of_double<Element>(fmaf(taps[1][i], current[i], fmaf(taps[0][i], before[i], taps[2][i])));
        *reinterpret_cast<uint2*>(target + tile_offset(first + r - 1, unit % 8)) =
            make_uint2(M::pack(sum[0], sum[1]), M::pack(sum[2], sum[3]));
      }
#pragma unroll
      for (int i = 0; i < 4; i++) before[i] = current[i];
    }
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

  __device__ __forceinline__ bool more_than(int number) const { return place.begin + number * kChunk < place.end; }

  // The start of everything: dt of the first chunks, taps, weights.
  __device__ __forceinline__ void prepare() {
    prefetch_dt(warp);
    const float dt_bias = args.dt_bias[head], A_log = args.A_log[head];  // on their way together with the taps
    load_taps<C>(shared, args, place);
    if (!C::STATE_ONLY && thread < D) shared.norm_weight[thread] = args.norm_weight[thread];
    const float rate = -expf(A_log) * 1.4426950408889634f;
    if (warp == 0) own().dt_bias = dt_bias, own().rate = rate;
    prepare_decays(0, dt_bias, rate);
  }

  // Tiles of the chunk whose raw rows were copied before the last PENDING groups of copies.
  template <int PENDING>
  __device__ __forceinline__ void make_tiles(int number) {
    wait_copies<PENDING>();
    locate();
    __syncthreads();  // ... everybody's; and the tiles that the convolution writes are no longer read, nor are the decays
    if (number > 0 && number % C::AHEAD == 0) prepare_decays(number, own().dt_bias, own().rate);
    convolve(number % C::STAGES);
    publish_to_matrix_units();
    __syncthreads();
  }
};

}  // namespace mmm
