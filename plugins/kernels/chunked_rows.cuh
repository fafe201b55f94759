// How a block of the chunked scan gets its convolved k, v and q tiles: raw rows prefetched, then conv + SiLU to shared memory.
#pragma once

#include "chunked_layout.cuh"
#include "matrix.cuh"

namespace mmm {

// What a block works on: one segment of one row of the batch, HEADS heads from `head` on, all of kv head `kv`.
struct Place {
  int batch, head, kv, segment;
  int length;       // valid tokens of this row
  int begin, end;   // tokens of this segment, end <= length
};

// Channel of the convolution at which tile 0 = k, 1 = v, 2.. = q of the block's heads begins.
template <class C>
__device__ __forceinline__ int tile_channel(const ChunkedArgs& args, const Place& place, int tile) {
  if (tile == 0) return (args.kv_heads + place.kv) * C::D;
  if (tile == 1) return place.kv * C::D;
  return (2 * args.kv_heads + place.head + tile - 2) * C::D;
}

template <class C>
__device__ __forceinline__ void load_taps(typename C::Shared& shared, const ChunkedArgs& args, const Place& place) {
  for (int i = threadIdx.x; i < C::TILES * C::D; i += C::THREADS) {
    const int tile = i / C::D, column = i % C::D, channel = tile_channel<C>(args, place, tile) + column;
    const int missing = C::TAPS - args.conv_width;  // the oldest taps of a narrower convolution are zero
#pragma unroll
    for (int tap = 0; tap <= C::TAPS; tap++) {
      float* const target = reinterpret_cast<float*>(&shared.taps[tap][tile][column / 4 % 2][column / 8]) + column % 4;
      if (tap == C::TAPS)
        *target = 0.5f * args.conv_bias[channel];
      else
        *target = tap < missing ? 0.f : 0.5f * args.conv_weight[channel * args.conv_width + tap - missing];
    }
  }
}

// One raw element of the convolution's input at token t, which may lie before the call (t < 0).
template <typename Element>
__device__ __forceinline__ Element raw_element(const ChunkedArgs& args, int batch, int channels, int channel, int t) {
  if (t >= 0)
    return static_cast<const Element*>(args.projected)[batch * args.batch_stride + t * args.token_stride + channel];
  const int kept = args.conv_width - 1;
  if (t < -kept) return Element(0.f);
  return static_cast<const Element*>(args.conv_state)[(static_cast<int64_t>(batch) * channels + channel) * kept + kept + t];
}

template <typename Element>
__device__ __forceinline__ uint4 raw_unit(const ChunkedArgs& args, int batch, int channels, int channel, int t) {
  uint4 unit;
  Element* elements = reinterpret_cast<Element*>(&unit);
#pragma unroll
  for (int e = 0; e < 8; e++) elements[e] = raw_element<Element>(args, batch, channels, channel + e, t);
  return unit;
}

template <bool, class A, class>
struct Either {  // std::conditional, which NVRTC does not have
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

// Raw rows of the next chunk on their way to shared memory. Row r of a tile is the chunk's token r - HALO.
template <typename Element, class C>
struct StagedRows {
  static constexpr int SWEEP = C::THREADS / C::UNITS;  // rows that all threads copy at once
  const Element* source;       // this thread's unit of row threadIdx / UNITS of the next chunk
  const Element* halo_source;  // of the rows before the chunk: threads of the first HALO * TILES rows of units copy one each
  uint32_t target, halo_target;
  int left;                    // valid tokens from this thread's first row on

  __device__ __forceinline__ StagedRows(typename C::Shared& shared, const ChunkedArgs& args, const Place& place,
                                        int channels) {
    const int unit = threadIdx.x % C::UNITS, r = threadIdx.x / C::UNITS, tile = r / C::HALO;
    const Element* rows = static_cast<const Element*>(args.projected) + place.batch * args.batch_stride;
    source = rows + (place.begin + r) * args.token_stride + unit * 8;
    target = shared_address(&shared.raw[0][C::HALO + r][unit]);
    left = place.length - place.begin - r;
    halo_target = 0;
    if (tile < C::TILES) {
      const int t = place.begin + r % C::HALO - C::HALO, channel = tile_channel<C>(args, place, tile) + unit * 8;
      halo_target = shared_address(&shared.raw[tile][r % C::HALO][unit]);
      halo_source = rows + static_cast<int64_t>(t) * args.token_stride + channel;
      if (t < 0)
        shared.raw[tile][r % C::HALO][unit] = raw_unit<Element>(args, place.batch, channels, channel, t);
      else
        copy_async(halo_target, halo_source, true);
    }
    copy(args, place);
  }
  __device__ __forceinline__ void next(const ChunkedArgs& args, const Place& place) {
    if (halo_target != 0) copy_async(halo_target, halo_source, true);
    copy(args, place);
  }
  __device__ __forceinline__ void copy(const ChunkedArgs& args, const Place& place) {
#pragma unroll
    for (int i = 0; i < kChunk / SWEEP; i++) {
      const Element* const row = source + i * SWEEP * args.token_stride;
#pragma unroll
      for (int tile = 0; tile < C::TILES; tile++)
        copy_async(target + (tile * (kChunk + C::HALO) + i * SWEEP) * C::UNITS * 16, row + tile_channel<C>(args, place, tile),
                   i * SWEEP < left);
    }
    source += kChunk * args.token_stride, halo_source += kChunk * args.token_stride, left -= kChunk;
  }
  __device__ __forceinline__ uint4 row(const typename C::Shared& shared, int tile, int first, int r, int unit) const {
    return shared.raw[tile][first + r][unit];
  }
};

// Raw rows of the next chunk on their way to registers: the ROWS rows that this thread convolves, and HALO before them.
template <typename Element, class C>
struct HeldRows {
  uint4 rows[C::TILES][C::ROWS + C::HALO];
  const Element* source;  // this thread's unit of its first row (HALO before those it convolves)
  int left;               // valid tokens from that row on

  __device__ __forceinline__ HeldRows(typename C::Shared&, const ChunkedArgs& args, const Place& place, int channels) {
    const int unit = threadIdx.x % C::UNITS, t = place.begin + threadIdx.x / C::UNITS * C::ROWS - C::HALO;
    source = static_cast<const Element*>(args.projected) + place.batch * args.batch_stride + t * args.token_stride + unit * 8;
    left = place.length - t;
    load(args, place, max(-t, 0));
    if (t < 0) {
#pragma unroll
      for (int tile = 0; tile < C::TILES; tile++)
#pragma unroll
        for (int r = 0; r < C::HALO; r++)
          if (t + r < 0)
            rows[tile][r] =
                raw_unit<Element>(args, place.batch, channels, tile_channel<C>(args, place, tile) + unit * 8, t + r);
    }
  }
  __device__ __forceinline__ void next(const ChunkedArgs& args, const Place& place) { load(args, place, 0); }
  __device__ __forceinline__ void load(const ChunkedArgs& args, const Place& place, int missing) {
#pragma unroll
    for (int tile = 0; tile < C::TILES; tile++) {
      const Element* const column = source + tile_channel<C>(args, place, tile);
#pragma unroll
      for (int r = 0; r < C::ROWS + C::HALO; r++)
        rows[tile][r] = r >= missing && r < left ? __ldg(reinterpret_cast<const uint4*>(column + r * args.token_stride))
                                                 : make_uint4(0, 0, 0, 0);
    }
    source += kChunk * args.token_stride, left -= kChunk;
  }
  __device__ __forceinline__ uint4 row(const typename C::Shared&, int tile, int, int r, int) const { return rows[tile][r]; }
};

// Convolve this thread's ROWS rows of one tile, 8 channels wide, and store them to `target`.
template <typename Element, class C, class Rows>
__device__ __forceinline__ void convolve_tile(const typename C::Shared& shared, const Rows& rows, int tile,
                                              Element (*target)[C::PITCH]) {
  const int local = threadIdx.x % C::HEAD_THREADS;
  const int unit = local % C::UNITS, first = local / C::UNITS * C::ROWS;
  float taps[C::TAPS + 1][8];
#pragma unroll
  for (int tap = 0; tap <= C::TAPS; tap++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<float4*>(&taps[tap][half * 4]) = shared.taps[tap][tile][half][unit];
  float window[C::HALO][8];
#pragma unroll
  for (int r = 0; r < C::ROWS + C::HALO; r++) {
    const uint4 packed = rows.row(shared, tile, first, r, unit);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    float current[8];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float2 pair = Matrix<Element>::unpack(words[w]);
      current[2 * w] = pair.x, current[2 * w + 1] = pair.y;
    }
    if (r >= C::HALO) {
      float sum[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum[i] = fmaf(taps[C::TAPS - 1][i], current[i], taps[C::TAPS][i]);
#pragma unroll
        for (int tap = 0; tap < C::HALO; tap++) sum[i] = fmaf(taps[tap][i], window[(r + tap) % C::HALO][i], sum[i]);
        sum[i] = silu_of_double<Element>(sum[i]);
      }
      *reinterpret_cast<uint4*>(&target[first + r - C::HALO][unit * 8]) =
          make_uint4(Matrix<Element>::pack(sum[0], sum[1]), Matrix<Element>::pack(sum[2], sum[3]),
                     Matrix<Element>::pack(sum[4], sum[5]), Matrix<Element>::pack(sum[6], sum[7]));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) window[r % C::HALO][i] = current[i];
  }
}

// Convolve the chunk: of two heads' threads the first make k, the second v; every head makes its own q.
template <typename Element, class C, class Rows>
__device__ __forceinline__ void convolve(typename C::Shared& shared, const Rows& rows) {
  const int group = threadIdx.x / C::HEAD_THREADS;
  if constexpr (C::HEADS == 1) {
    convolve_tile<Element, C>(shared, rows, 0, shared.k);
    convolve_tile<Element, C>(shared, rows, 1, shared.v);
  } else {
    convolve_tile<Element, C>(shared, rows, group, group == 0 ? shared.k : shared.v);
  }
  if constexpr (!C::STATE_ONLY)  // with one head the tile's number must be a constant, or held rows would go to local memory
    convolve_tile<Element, C>(shared, rows, C::HEADS == 1 ? 2 : 2 + group, shared.head[group].q);
}

}  // namespace mmm
