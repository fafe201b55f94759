// make_tiles: grid (C / 128, chunks, B), 256 threads. A block makes one tile of 64 tokens x 128 channels: a thread 4 rows of 8
// channels, from raw rows that it holds in registers. Blocks of q work out their head's decays too; those of the last chunk keep the
// conv state. Bytes a token: 8,192 in, 8,192 out for mmMamba's 4,096 channels.
#pragma once

#include "chunked_rows.cuh"
#include "short_layout.cuh"

namespace mmm {

template <typename Element, int TAPS>
struct ShortTiles {
  static constexpr int HALO = TAPS - 1, ROWS = 4, UNITS = kShortDim / 8, THREADS = UNITS * kChunk / ROWS;
  struct Shared {
    float4 taps[TAPS + 1][UNITS][2];  // weights and, last, the bias, halved for silu_of_double
  };
};

// Rows of the tile that blockIdx names.
template <typename Element, int TAPS>
__device__ __forceinline__ void convolve_short(const ShortArgs& args, typename ShortTiles<Element, TAPS>::Shared& shared) {
  using T = ShortTiles<Element, TAPS>;
  using M = Matrix<Element>;
  const ChunkedArgs& scan = args.scan;
  const int number = blockIdx.x, chunk = blockIdx.y, batch = blockIdx.z;
  const int channels = args.tiles_of_chunk() * kShortDim;
  const int unit = threadIdx.x % T::UNITS, first = threadIdx.x / T::UNITS * T::ROWS;
  const int channel = number * kShortDim + unit * 8, begin = chunk * kChunk + first, length = scan.length(batch);
  const Element* const rows = static_cast<const Element*>(scan.projected) + batch * scan.batch_stride + channel;
  uint4 raw[T::ROWS + T::HALO];
#pragma unroll
  for (int r = 0; r < T::ROWS + T::HALO; r++) {
    const int t = begin + r - T::HALO;
    raw[r] = make_uint4(0, 0, 0, 0);
    if (t < 0)
      raw[r] = raw_unit<Element>(scan, batch, channels, channel, t);
    else if (t < length)
      raw[r] = __ldg(reinterpret_cast<const uint4*>(rows + t * scan.token_stride));
  }
  const int missing = TAPS - scan.conv_width;  // the oldest taps of a narrower convolution are zero
  for (int i = threadIdx.x; i < (TAPS + 1) * kShortDim; i += T::THREADS) {
    const int column = i / (TAPS + 1), tap = i % (TAPS + 1), at = number * kShortDim + column;
    float value = 0.f;
    if (tap == TAPS)
      value = scan.conv_bias[at];
    else if (tap >= missing)
      value = scan.conv_weight[at * scan.conv_width + tap - missing];
    reinterpret_cast<float*>(&shared.taps[tap])[column] = 0.5f * value;
  }
  __syncthreads();
  float taps[TAPS + 1][8];
#pragma unroll
  for (int tap = 0; tap <= TAPS; tap++)
#pragma unroll
    for (int half = 0; half < 2; half++) *reinterpret_cast<float4*>(&taps[tap][half * 4]) = shared.taps[tap][unit][half];
  float window[T::HALO][8];
  unsigned char* const target = args.tile(batch, chunk, number) + unit / 8 * kHalfTileBytes;
#pragma unroll
  for (int r = 0; r < T::ROWS + T::HALO; r++) {
    const uint32_t words[4] = {raw[r].x, raw[r].y, raw[r].z, raw[r].w};
    float current[8];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float2 pair = M::unpack(words[w]);
      current[2 * w] = pair.x, current[2 * w + 1] = pair.y;
    }
    if (r >= T::HALO) {
      float sum[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum[i] = fmaf(taps[TAPS - 1][i], current[i], taps[TAPS][i]);
#pragma unroll
        for (int tap = 0; tap < T::HALO; tap++) sum[i] = fmaf(taps[tap][i], window[(r + tap) % T::HALO][i], sum[i]);
        sum[i] = silu_of_double<Element>(sum[i]);
      }
      *reinterpret_cast<uint4*>(target + tile_offset(first + r - T::HALO, unit % 8)) =
          make_uint4(M::pack(sum[0], sum[1]), M::pack(sum[2], sum[3]), M::pack(sum[4], sum[5]), M::pack(sum[6], sum[7]));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) window[r % T::HALO][i] = current[i];
  }
}

template <typename Element, int TAPS>
__global__ void __launch_bounds__(256) make_tiles(const __grid_constant__ ShortArgs args) {
  __shared__ typename ShortTiles<Element, TAPS>::Shared shared;
  const ChunkedArgs& scan = args.scan;
  const int number = blockIdx.x, chunk = blockIdx.y, batch = blockIdx.z;
  const int filled = args.filled(batch), length = scan.length(batch);
  let_next_kernel_start();
  const int head = number - 2 * scan.kv_heads;
  if (head >= 0 && chunk < filled && threadIdx.x < 32) {
    const int dt = args.tiles_of_chunk() * kShortDim + scan.heads * kShortDim + head;
    const float2 raw = load_dt<Element>(scan, batch, dt, chunk * kChunk + 2 * threadIdx.x, length);
    const float bias = scan.dt_bias[head], rate = -expf(scan.A_log[head]) * 1.4426950408889634f;
    write_decays(args.decays_of(batch, head)[chunk], raw, bias, rate, threadIdx.x);
  }
  if (chunk < filled) convolve_short<Element, TAPS>(args, shared);
  if (chunk == max(filled - 1, 0) && threadIdx.x < kShortDim) {  // the last K-1 raw rows
    const int kept = scan.conv_width - 1, channels = args.tiles_of_chunk() * kShortDim, channel = number * kShortDim + threadIdx.x;
    Element* const out = static_cast<Element*>(scan.conv_state_out) + (static_cast<int64_t>(batch) * channels + channel) * kept;
    for (int j = 0; j < kept; j++) out[j] = raw_element<Element>(scan, batch, channels, channel, length - kept + j);
  }
}

}  // namespace mmm
