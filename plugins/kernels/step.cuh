// The decode step: everything between the two matrix products of a layer, for one token, in one launch.
//
// Grid (PARTS * H/G, G, B), 32 * WARPS threads. The PARTS blocks of a head hold ROWS = P / PARTS rows of its state each; on
// sm_90 and newer they are a cluster, before it PARTS is 1. A row of the state is spread over the LANES lanes of a warp that 16
// bytes each make up; a warp holds ACCESSES times the 32 / LANES rows that one access of all its lanes covers. Every block
// convolves its head's k and q and its own rows of v, one channel a thread and round.
// Bytes a token and head: state read and written once, 2 P N sizeof(State); row, conv state and weights about 1 % of that.
// The states are loaded before anything else, and every block has all of its part in flight at once: at batch 1 what counts is
// the chain behind the loads. So y is taken from the old state, S_t q = decay S_{t-1} q + delta v (k q), which needs neither
// delta nor the update; the blocks exchange their sums of squares by one store into each other's mailbox, no barrier; and where
// a warp holds little, the new state is written while those stores fly.
// Limits: P and N 64 or 128, G and B at most 65535. launch_step gives all other shapes to launch_sequential. Measured: docs/plugins.md.
#pragma once

#include "activations.cuh"
#include "cluster.cuh"
#include "types.cuh"

namespace mmm {

struct StepArgs {
  const void *projected, *conv_state, *ssm_state;
  void *y, *conv_state_out, *ssm_state_out;
  const int32_t* lengths;
  const float *conv_weight, *conv_bias, *dt_bias, *A_log, *norm_weight;
  int64_t batch_stride;
  int32_t heads, kv_heads, group_heads, conv_width, overlap;  // group_heads: H / G
  float eps;
};

// OLD_TAPS: room for conv_width - 1 earlier inputs; conv width 2 has kernels of its own.
template <typename Element_, typename State_, int P_, int N_, int OLD_TAPS, int PARTS_, int WARPS_>
struct Step {
  using Element = Element_;
  using State = State_;
  using Vector = Vector16<State>;
  static constexpr int P = P_, N = N_, PARTS = PARTS_, WARPS = WARPS_;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROWS = P / PARTS;         // of the state, in a block
  static constexpr int COLUMNS = Vector::kSize;  // of a lane
  static constexpr int LANES = N / COLUMNS;      // that hold a row
  static constexpr int ROWS_PER_ACCESS = 32 / LANES;
  static constexpr int ACCESSES = ROWS / (WARPS * ROWS_PER_ACCESS);
  static constexpr int COPIES = LANES / ACCESSES;  // lanes that end up with the same row's y
  static constexpr int CHANNELS = 2 * N + ROWS;    // [k | q | v] of a block
  static constexpr int ROUNDS = (CHANNELS + THREADS - 1) / THREADS;
  static constexpr bool STORES_LAST =
      ACCESSES <= 4;  // else the bandwidth counts, and the stores had better start early
  static_assert(ROWS % (WARPS * ROWS_PER_ACCESS) == 0 && LANES % ACCESSES == 0, "rows do not divide over the warps");

  struct Shared {
    alignas(16) float channels[CHANNELS];
    float squares[PARTS * WARPS];
    Mailbox mailbox;
  };

  const StepArgs& args;
  Shared& shared;
  const unsigned thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int batch = blockIdx.z, kv_head = blockIdx.y, head_of_group = blockIdx.x / PARTS;
  const int head, part, conv_channels;
  const unsigned own_row;  // of the block: the row whose y this lane holds in the end

  Vector state[ACCESSES];
  int channel[ROUNDS];
  float weight[ROUNDS], bias[ROUNDS], old_weight[ROUNDS][OLD_TAPS], A_log, dt_bias, norm_weight;
  Element old_taps[ROUNDS][OLD_TAPS], now[ROUNDS], dt, gate;
  int length = 1;

  // Earlier inputs that the convolution takes: a constant where the kernel has room for just one.
  __device__ __forceinline__ int old_count() const { return OLD_TAPS == 1 ? 1 : args.conv_width - 1; }

  __device__ __forceinline__ Step(const StepArgs& a, Shared& s)
      : args(a),
        shared(s),
        head(kv_head * a.group_heads + head_of_group),
        part(PARTS > 1 ? cluster_rank() : 0),
        conv_channels(a.kv_heads * (P + N) + a.heads * N),
        own_row(row(lane % LANES / COPIES)) {
    const int first_k = a.kv_heads * P + kv_head * N, first_q = a.kv_heads * (P + N) + head * N;
    const int first_v = kv_head * P + part * ROWS;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = index(r);
      channel[r] = i + (i < N ? first_k : i < 2 * N ? first_q - N : first_v - 2 * N);
    }
  }

  // Which of the block's CHANNELS this thread convolves in a round, and whether there is one.
  __device__ __forceinline__ int index(int round) const { return static_cast<int>(thread) + round * THREADS; }
  __device__ __forceinline__ bool any(int round) const {
    return (round + 1) * THREADS <= CHANNELS || index(round) < CHANNELS;
  }

  __device__ __forceinline__ unsigned row(int access) const {  // of the block
    return (warp * ACCESSES + access) * ROWS_PER_ACCESS + lane / LANES;
  }
  __device__ __forceinline__ int64_t state_offset() const {  // of this thread's first 16 bytes
    return static_cast<int64_t>(batch * args.heads + head) * (P * N) + (part * ROWS + row(0)) * N +
           lane % LANES * COLUMNS;
  }

  __device__ __forceinline__ void load_states() {
    const State* const in = static_cast<const State*>(args.ssm_state) + state_offset();
#pragma unroll
    for (int a = 0; a < ACCESSES; a++) state[a] = Vector::load_streaming(in + a * ROWS_PER_ACCESS * N);
  }

  __device__ __forceinline__ void load_weights() {
    const int old = old_count();
    const Element* const in =
        static_cast<const Element*>(args.conv_state) + static_cast<int64_t>(batch) * (conv_channels * old);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      if (!any(r)) continue;
      const int c = channel[r];
#pragma unroll
      for (int i = 0; i < OLD_TAPS; i++) {
        if (i >= old) continue;
        old_taps[r][i] = in[c * old + i];
        old_weight[r][i] = __ldg(args.conv_weight + c * (old + 1) + i);
      }
      weight[r] = __ldg(args.conv_weight + c * (old + 1) + old);
      bias[r] = __ldg(args.conv_bias + c);
    }
    A_log = __ldg(args.A_log + head);
    dt_bias = __ldg(args.dt_bias + head);
    norm_weight = __ldg(args.norm_weight + part * ROWS + own_row);
  }

  __device__ __forceinline__ void load_inputs() {
    const Element* const in = static_cast<const Element*>(args.projected) + batch * args.batch_stride;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (any(r)) now[r] = in[channel[r]];
    dt = in[conv_channels + args.heads * P + head];
    gate = in[conv_channels + head * P + part * ROWS + own_row];
    if (args.lengths != nullptr) length = args.lengths[batch];
  }

  __device__ __forceinline__ void convolve() {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      if (!any(r)) continue;
      float sum = bias[r];
#pragma unroll
      for (int i = 0; i < OLD_TAPS; i++)
        if (i < old_count()) sum = fmaf(to_float(old_taps[r][i]), old_weight[r][i], sum);
      shared.channels[index(r)] = silu(fmaf(to_float(now[r]), weight[r], sum));
    }
  }

  // The conv state moves on by one token. Several blocks convolve the same channel; one of them writes it.
  __device__ __forceinline__ void store_conv_state() const {
    const int old = old_count();
    Element* const out =
        static_cast<Element*>(args.conv_state_out) + static_cast<int64_t>(batch) * (conv_channels * old);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = index(r);
      const bool first_head = head_of_group == 0;
      const bool mine = i < N ? part == 0 && first_head : i < 2 * N ? part == 0 : first_head;
      if (!any(r) || !mine) continue;
#pragma unroll
      for (int t = 0; t < OLD_TAPS; t++) {
        if (t >= old) continue;
        Element next = t + 1 < old && t + 1 < OLD_TAPS ? old_taps[r][(t + 1) % OLD_TAPS] : now[r];
        if (length <= 0) next = old_taps[r][t];
        out[channel[r] * old + t] = next;
      }
    }
  }

  __device__ __forceinline__ void update_and_store(int access, const float (&k)[COLUMNS], float decay, float delta) {
    if (length > 0) {  // else the state is handed on as it is
      const float u = delta * shared.channels[2 * N + row(access)];
      float s[COLUMNS];
      state[access].unpack(s);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) s[c] = fmaf(s[c], decay, u * k[c]);
      state[access].pack(s);
    }
    State* const out = static_cast<State*>(args.ssm_state_out) + state_offset();
    state[access].store_streaming(out + access * ROWS_PER_ACCESS * N);
  }

  // Sums y[0..COUNT) over 2 * STEP lanes. While several rows remain, half of them go to the other half of the lanes at each
  // step: lane l is left with y[l % LANES / COPIES], for ACCESSES - 1 + log2(COPIES) shuffles in all.
  template <int COUNT, int STEP>
  static __device__ __forceinline__ float reduce_rows(float (&y)[ACCESSES], int lane) {
    if constexpr (STEP == 0) {
      return y[0];
    } else if constexpr (COUNT == 1) {
      y[0] += __shfl_xor_sync(~0u, y[0], STEP);
      return reduce_rows<1, STEP / 2>(y, lane);
    } else {
      const bool upper = lane & STEP;
#pragma unroll
      for (int r = 0; r < COUNT / 2; r++) {
        const float kept = upper ? y[r + COUNT / 2] : y[r], given = upper ? y[r] : y[r + COUNT / 2];
        y[r] = kept + __shfl_xor_sync(~0u, given, STEP);
      }
      return reduce_rows<COUNT / 2, STEP / 2>(y, lane);
    }
  }

  __device__ __forceinline__ void send_squares(float squares) {
#if __CUDA_ARCH__ >= 900
    if constexpr (PARTS > 1) {
      if (lane < PARTS)
        store_and_count(shared_address(&shared.squares[part * WARPS + warp]), shared.mailbox, lane, squares);
      return;
    }
#endif
    if (lane == 0) shared.squares[warp] = squares;
  }

  // The sum over the head's rows, added in the same order by every warp of every block.
  __device__ __forceinline__ float receive_squares() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (PARTS > 1) shared.mailbox.wait();
    else
#endif
      __syncthreads();
    constexpr int kSums = PARTS * WARPS;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSums; i += 32) sum += shared.squares[(i + lane) % kSums];  // every lane of a few sums gets one
#pragma unroll
    for (int step = kSums < 32 ? kSums / 2 : 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }

  __device__ __forceinline__ void run() {
    if (!args.overlap) load_inputs();  // the longest chain hangs on them; with overlap they are not there yet
    load_states();
    load_weights();
#if __CUDA_ARCH__ >= 900
    if constexpr (PARTS > 1) {  // the blocks arrive here, and ask whether the others did only long after
      if (thread == 0) shared.mailbox.open();
      __syncwarp();
      if (thread == 0) shared.mailbox.expect(sizeof(shared.squares));
      __syncwarp();
      cluster_arrive_relaxed();
    }
#endif
    if (args.overlap) {
      wait_for_previous_kernel();
      load_inputs();
    }
    // Not before the wait: the next kernel may read ahead what the one before this wrote, so that must be complete.
    let_next_kernel_start();

    convolve();
    const float delta = softplus(to_float(dt) + dt_bias), decay = expf(-expf(A_log) * delta);
#if __CUDA_ARCH__ >= 900
    if constexpr (PARTS > 1) cluster_wait();  // all mailboxes are open: every block arrived long ago
#endif
    __syncthreads();

    float k[COLUMNS], q[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 4) {
      const int column = lane % LANES * COLUMNS + c;
      const float4 k4 = *reinterpret_cast<const float4*>(&shared.channels[column]);
      const float4 q4 = *reinterpret_cast<const float4*>(&shared.channels[N + column]);
      k[c] = k4.x, k[c + 1] = k4.y, k[c + 2] = k4.z, k[c + 3] = k4.w;
      q[c] = q4.x, q[c + 1] = q4.y, q[c + 2] = q4.z, q[c + 3] = q4.w;
    }
    float kq = 0.f, y[ACCESSES];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) kq = fmaf(k[c], q[c], kq);
#pragma unroll
    for (int a = 0; a < ACCESSES; a++) {
      float s[COLUMNS];
      state[a].unpack(s);
      y[a] = 0.f;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) y[a] = fmaf(s[c], q[c], y[a]);
      if constexpr (!STORES_LAST) update_and_store(a, k, decay, delta);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) kq += __shfl_xor_sync(~0u, kq, step);
    const float own =
        fmaf(decay, reduce_rows<ACCESSES, LANES / 2>(y, lane), delta * shared.channels[2 * N + own_row] * kq);
    float squares = own * own;
#pragma unroll
    for (int step = 16; step >= COPIES; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    send_squares(squares);

    if constexpr (STORES_LAST) {
#pragma unroll
      for (int a = 0; a < ACCESSES; a++) update_and_store(a, k, decay, delta);
    }
    store_conv_state();
    const float gated = own * norm_weight * silu(to_float(gate));

    const float scale = rsqrtf(receive_squares() * (1.f / P) + args.eps);
    Element* const out =
        static_cast<Element*>(args.y) + static_cast<int64_t>(batch * args.heads + head) * P + part * ROWS;
    if (lane % COPIES == 0) out[own_row] = from_float<Element>(length > 0 ? scale * gated : 0.f);
  }
};

template <class Step>
__global__ void __launch_bounds__(Step::THREADS) step_kernel(const __grid_constant__ StepArgs args) {
  __shared__ typename Step::Shared shared;
  Step(args, shared).run();
}

}  // namespace mmm
