// What the deltas of a chunk of 64 tokens mean for one head. One warp works them out, two tokens a lane.
#pragma once

#include "chunked_layout.cuh"
#include "matrix.cuh"

namespace mmm {

struct alignas(16) ChunkDecays {
  float decay[kChunk];    // log2 of the decay from the chunk's start to after token t
  float arrival[kChunk];  // decay - log2(delta): token t adds exp2(decay[i] - arrival[t]) v_t k_t^T to the state at i
  float weight[kChunk];   // the same at the chunk's end
  float end;              // decay[kChunk - 1]
};

// The raw dt of tokens t and t + 1; -infinity, which gives delta 0, past the row's length.
template <typename Element>
__device__ __forceinline__ float2 load_dt(const ChunkedArgs& args, int batch, int channel, int t, int length) {
  const Element* const rows = static_cast<const Element*>(args.projected) + batch * args.batch_stride + channel;
  const float none = __int_as_float(0xff800000);
  return make_float2(t < length ? float(rows[t * args.token_stride]) : none,
                     t + 1 < length ? float(rows[(t + 1) * args.token_stride]) : none);
}

// `rate` = -exp(A_log) log2(e). The whole warp calls this; lane l gives the raw dt of tokens 2l and 2l + 1.
__device__ __forceinline__ void write_decays(ChunkDecays& decays, float2 raw_dt, float bias, float rate, int lane) {
  float delta[2] = {raw_dt.x + bias, raw_dt.y + bias};
#pragma unroll
  for (int i = 0; i < 2; i++) delta[i] = delta[i] > 20.f ? delta[i] : log1pf(__expf(delta[i]));
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
  if (lane == 0) decays.end = end;
}

}  // namespace mmm
