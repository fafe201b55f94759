// The scan token by token in float32: any size and type, any length. It serves float32 bundles and the sizes that have
// no matrix kernel.
//
// Grid (parts * H * B), 448 threads. The `parts` blocks of a head hold P / parts rows of its state each, in registers from the
// first token to the last; on sm_90 and newer they are a cluster that exchanges sums of squares, before it parts is 1.
// A block works on chunks of 16 tokens as a pipeline of three kinds of warps, with one barrier a chunk:
//   convolvers (4 warps)  thread i: channel i of k, of q and of the block's v; loads a chunk ahead into registers
//   walkers (8 warps)     8 lanes a row, ROW_TILE rows and 4 * VECTORS columns a thread; no barrier between tokens
//   writers (2 warps)     4 lanes a token: sums of squares, then gate, norm and store
// Chunk c is convolved in turn c, walked in turn c+1, its squares summed and sent in c+2, received by the barrier of c+3,
// written in c+4.
// Bytes a token and head: N + P / parts inputs read by each block, 2 P for gate and y; the state moves twice a call.
// Work a token and head: 3 P N operations, so one block takes at least 384 cycles at 128x128. Measured: docs/plugins.md.
// Limits: P and N multiples of 16 up to 128, K 2..4; 75 KB of shared memory at P = N = 128 and one block a head.
#pragma once

#include "activations.cuh"
#include "cluster.cuh"
#include "types.cuh"

namespace mmm::sequential {

constexpr int kChunk = 16;
constexpr int kConvolvers = 128, kWalkers = 256, kWriters = 64;  // threads
constexpr int kThreads = kWalkers + kConvolvers + kWriters;
constexpr int kTaps = 4;   // the widest convolution
constexpr int kLanes = 8;  // that share a row of the state
constexpr int kMostBlocks = 8;
constexpr int kValueStages = 5;  // a chunk's v, then y, live for five turns
constexpr int kSquareStages =
    4;  // a block may be one turn ahead of another, which still reads what came three turns ago

struct Args {
  mmm_scan_args call;
  int32_t parts;
};

template <int ROW_TILE, int VECTORS>
struct Shared {
  static constexpr int ROWS = kWalkers / kLanes * ROW_TILE;  // room for
  static constexpr int COLUMNS = 4 * VECTORS * kLanes;       // room for; zeros past N
  float k[2][kChunk][COLUMNS], q[2][kChunk][COLUMNS];
  float value[kValueStages][kChunk][ROWS];  // v, overwritten by y
  float squares[kSquareStages][kMostBlocks][kChunk];
  float delta[2][kChunk], decay[2][kChunk];
  float norm_weight[ROWS];
};

// What every role needs to know about this block.
template <typename Element>
struct Place {
  const mmm_scan_args& call;
  int P, N, K, heads, kv_heads, parts, part, head, kv_head, batch, rows, length, conv_channels;
  const Element* projected;  // of this row of the batch

  __device__ __forceinline__ explicit Place(const Args& args) : call(args.call), parts(args.parts) {
    const mmm_scan_shape& shape = call.shape;
    P = shape.head_dim, N = shape.state_dim, K = shape.conv_width, heads = shape.heads, kv_heads = shape.kv_heads;
    part = static_cast<int>(blockIdx.x) % parts;
    const int index = static_cast<int>(blockIdx.x) / parts;
    head = index % heads, batch = index / heads, kv_head = head / (heads / kv_heads), rows = P / parts;
    conv_channels = kv_heads * (P + N) + heads * N;
    length = call.lengths == nullptr ? shape.tokens : min(max(call.lengths[batch], 0), shape.tokens);
    projected = static_cast<const Element*>(call.projected) + batch * call.projected_batch_stride;
  }
  __device__ __forceinline__ const Element* token(int t) const { return projected + t * call.projected_token_stride; }
  __device__ __forceinline__ int chunks() const { return (length + kChunk - 1) / kChunk; }
  __device__ __forceinline__ int64_t head_index() const { return static_cast<int64_t>(batch) * heads + head; }
  __device__ __forceinline__ Element* y(int t) const {  // of this block's rows
    return static_cast<Element*>(call.y) + ((static_cast<int64_t>(batch) * call.shape.tokens + t) * heads + head) * P +
           part * rows;
  }
};

// Convolution, SiLU and delta. Thread i owns channel i of three kinds: 0 k, 1 q, 2 v.
template <typename Element, class Shared>
struct Convolver {
  const Place<Element>& place;
  Shared& shared;
  const int thread;
  int channel[3];  // -1: none
  float weight[3][kTaps], bias[3], dt_bias, A;
  float old[3][kTaps - 1];  // the inputs before the chunk, the newest last
  Element raw[3][kChunk], raw_dt;

  __device__ __forceinline__ Convolver(const Place<Element>& p, Shared& s, int i) : place(p), shared(s), thread(i) {
    channel[0] = i < p.N ? p.kv_heads * p.P + p.kv_head * p.N + i : -1;
    channel[1] = i < p.N ? p.kv_heads * (p.P + p.N) + p.head * p.N + i : -1;
    channel[2] = i < p.rows ? p.kv_head * p.P + p.part * p.rows + i : -1;
  }

  // Input t of a channel; before the first token it comes from the conv state.
  __device__ __forceinline__ Element input(int c, int t) const {
    if (t >= 0) return place.token(t)[c];
    const int64_t row = static_cast<int64_t>(place.batch) * place.conv_channels + c;
    return static_cast<const Element*>(place.call.conv_state)[row * (place.K - 1) + place.K - 1 + t];
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int kind = 0; kind < 3; kind++) {
      const int c = channel[kind];
#pragma unroll
      for (int i = 0; i < kTaps; i++) {
        const bool used = c >= 0 && i >= kTaps - place.K;
        weight[kind][i] = used ? place.call.conv_weight[c * place.K + i - (kTaps - place.K)] : 0.f;
        if (i < kTaps - 1) old[kind][i] = used ? to_float(input(c, i - (kTaps - 1))) : 0.f;
      }
      bias[kind] = c >= 0 ? place.call.conv_bias[c] : 0.f;
    }
    dt_bias = place.call.dt_bias[place.head];
    A = -expf(place.call.A_log[place.head]);
    load(0);
  }

  __device__ __forceinline__ void load(int chunk) {
    const int begin = chunk * kChunk, valid = place.length - begin;
    const Element* row = place.token(begin);
#pragma unroll
    for (int t = 0; t < kChunk; t++) {
#pragma unroll
      for (int kind = 0; kind < 3; kind++)
        raw[kind][t] = channel[kind] >= 0 && t < valid ? row[channel[kind]] : from_float<Element>(0.f);
      row += place.call.projected_token_stride;
    }
    if (thread < min(kChunk, valid))
      raw_dt = place.token(begin + thread)[place.conv_channels + place.heads * place.P + place.head];
  }

  __device__ __forceinline__ void convolve(int chunk) {
#pragma unroll
    for (int kind = 0; kind < 3; kind++) {
      if (channel[kind] < 0) continue;
      float* const out = kind == 0   ? &shared.k[chunk % 2][0][thread]
                         : kind == 1 ? &shared.q[chunk % 2][0][thread]
                                     : &shared.value[chunk % kValueStages][0][thread];
      const int pitch = kind == 2 ? Shared::ROWS : Shared::COLUMNS;
#pragma unroll
      for (int t = 0; t < kChunk; t++) {
        const float now = to_float(raw[kind][t]);
        float sum = bias[kind];
#pragma unroll
        for (int i = 0; i < kTaps - 1; i++)
          if (i >= kTaps - place.K) sum = fmaf(old[kind][i], weight[kind][i], sum);
        out[t * pitch] = silu(fmaf(now, weight[kind][kTaps - 1], sum));
        old[kind][0] = old[kind][1], old[kind][1] = old[kind][2], old[kind][2] = now;
      }
    }
    if (thread < kChunk && chunk * kChunk + thread < place.length) {
      const float delta = softplus(to_float(raw_dt) + dt_bias);
      shared.delta[chunk % 2][thread] = delta;
      shared.decay[chunk % 2][thread] = expf(A * delta);
    }
    if (chunk + 1 < place.chunks()) load(chunk + 1);
  }

  // Several blocks convolve the same channel; one of them writes its state.
  __device__ __forceinline__ void store_conv_state() const {
    const bool first_head = place.head % (place.heads / place.kv_heads) == 0;
    const bool mine[3] = {first_head && place.part == 0, place.part == 0, first_head};
#pragma unroll
    for (int kind = 0; kind < 3; kind++) {
      if (channel[kind] < 0 || !mine[kind]) continue;
      const int64_t row = static_cast<int64_t>(place.batch) * place.conv_channels + channel[kind];
      Element* const out = static_cast<Element*>(place.call.conv_state_out) + row * (place.K - 1);
      for (int i = 0; i < place.K - 1; i++) out[i] = input(channel[kind], place.length - (place.K - 1) + i);
    }
  }
};

// The recurrence. A thread holds ROW_TILE neighbouring rows; of their columns, four of every 32.
template <typename Element, int ROW_TILE, int VECTORS>
struct Walker {
  using Memory = Shared<ROW_TILE, VECTORS>;
  static constexpr int COPIES = kLanes / ROW_TILE;  // lanes that end up with the same row's y
  const Place<Element>& place;
  Memory& shared;
  const int lane, first_row;
  float state[ROW_TILE][VECTORS][4];

  __device__ __forceinline__ Walker(const Place<Element>& p, Memory& s, int thread)
      : place(p), shared(s), lane(thread % kLanes), first_row(thread / kLanes * ROW_TILE) {}

  __device__ __forceinline__ bool idle() const { return first_row >= place.rows; }  // the same for a whole warp

  __device__ __forceinline__ int64_t state_index(int row, int vector) const {
    return (place.head_index() * place.P + place.part * place.rows + first_row + row) * place.N + vector * 4 * kLanes +
           lane * 4;
  }
  __device__ __forceinline__ bool has_columns(int vector) const { return vector * 4 * kLanes + lane * 4 < place.N; }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int r = 0; r < ROW_TILE; r++)
#pragma unroll
      for (int v = 0; v < VECTORS; v++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          state[r][v][e] =
              has_columns(v) ? load_as_float(place.call.ssm_state, place.call.shape.state_dtype, state_index(r, v) + e)
                             : 0.f;
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int r = 0; r < ROW_TILE; r++)
#pragma unroll
      for (int v = 0; v < VECTORS; v++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (has_columns(v))
            store_from_float(place.call.ssm_state_out, place.call.shape.state_dtype, state_index(r, v) + e,
                             state[r][v][e]);
  }

  // Sums y[0..COUNT) over 2 * STEP lanes, giving half of the rows to the other half of the lanes at each step while there are
  // several: lane l of the row's lanes is left with y[l / COPIES].
  template <int COUNT, int STEP>
  static __device__ __forceinline__ float reduce_rows(float (&y)[ROW_TILE], int lane) {
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

  __device__ __forceinline__ void walk(int chunk) {
    const int tokens = min(kChunk, place.length - chunk * kChunk), stage = chunk % 2;
    float (&values)[kChunk][Memory::ROWS] = shared.value[chunk % kValueStages];
#pragma unroll 2
    for (int t = 0; t < tokens; t++) {
      float4 k[VECTORS], q[VECTORS];
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        k[v] = *reinterpret_cast<const float4*>(&shared.k[stage][t][v * 4 * kLanes + lane * 4]);
        q[v] = *reinterpret_cast<const float4*>(&shared.q[stage][t][v * 4 * kLanes + lane * 4]);
      }
      const float decay = shared.decay[stage][t], delta = shared.delta[stage][t];
      float y[ROW_TILE];
#pragma unroll
      for (int r = 0; r < ROW_TILE; r++) {
        const float u = delta * values[t][first_row + r];
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
          float (&s)[4] = state[r][v];
          s[0] = fmaf(s[0], decay, u * k[v].x), s[1] = fmaf(s[1], decay, u * k[v].y);
          s[2] = fmaf(s[2], decay, u * k[v].z), s[3] = fmaf(s[3], decay, u * k[v].w);
          even = fmaf(s[0], q[v].x, even), odd = fmaf(s[1], q[v].y, odd);
          even = fmaf(s[2], q[v].z, even), odd = fmaf(s[3], q[v].w, odd);
        }
        y[r] = even + odd;
      }
      const float sum = reduce_rows<ROW_TILE, kLanes / 2>(y, lane);
      __syncwarp();  // every lane has read its v, whose place y takes; shuffles order no memory
      if (lane % COPIES == 0) values[t][first_row + lane / COPIES] = sum;
    }
  }
};

// Norm, gate, store. 4 lanes own a token; lane j its rows j, j+4, ...
template <typename Element, class Shared>
struct Writer {
  static constexpr int kShares = kWriters / kChunk;     // lanes of a token
  static constexpr int kRows = Shared::ROWS / kShares;  // of a lane, at most
  const Place<Element>& place;
  Shared& shared;
  const int token, share;
  Element gate[kRows];  // of the chunk that is written next

  __device__ __forceinline__ Writer(const Place<Element>& p, Shared& s, int thread)
      : place(p), shared(s), token(thread / kShares), share(thread % kShares) {}

  __device__ __forceinline__ void send_squares(int chunk) {
    const float* const y = shared.value[chunk % kValueStages][token];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; i++)
      if (share + i * kShares < place.rows) sum = fmaf(y[share + i * kShares], y[share + i * kShares], sum);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* const mine = &shared.squares[chunk % kSquareStages][place.part][token];
#if __CUDA_ARCH__ >= 900
    if (place.parts > 1) {
      for (int block = share; block < place.parts; block += kShares)
        store_in_block(address_in_block(shared_address(mine), block), sum);
      return;
    }
#endif
    if (share == 0) *mine = sum;
  }

  __device__ __forceinline__ void load_gate(int chunk) {
    const int t = chunk * kChunk + token;
    if (t >= place.length) return;
    const Element* const in = place.token(t) + place.conv_channels + place.head * place.P + place.part * place.rows;
#pragma unroll
    for (int i = 0; i < kRows; i++)
      if (share + i * kShares < place.rows) gate[i] = in[share + i * kShares];
  }

  __device__ __forceinline__ void write(int chunk) const {
    const int t = chunk * kChunk + token;
    if (t >= place.length) return;
    float sum = 0.f;
    for (int block = 0; block < place.parts; block++) sum += shared.squares[chunk % kSquareStages][block][token];
    const float scale = rsqrtf(sum / static_cast<float>(place.P) + place.call.shape.eps);
    Element* const out = place.y(t);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int row = share + i * kShares;
      if (row < place.rows)
        out[row] = from_float<Element>(shared.value[chunk % kValueStages][token][row] * scale *
                                       shared.norm_weight[row] * silu(to_float(gate[i])));
    }
  }
};

// The end of a turn. What a block of the cluster sends in one turn can be read by the others two turns later.
__device__ __forceinline__ void end_turn(int parts, bool first) {
#if __CUDA_ARCH__ >= 900
  if (parts > 1) {
    __syncwarp();
    if (!first) cluster_wait();
    cluster_arrive();
  }
#endif
  barrier(1, kThreads);  // each role comes here by a way of its own, which __syncthreads does not allow
}

template <typename Element, int ROW_TILE, int VECTORS>
__global__ void __launch_bounds__(kThreads) scan_kernel(const __grid_constant__ Args args) {
  using Memory = Shared<ROW_TILE, VECTORS>;
  extern __shared__ __align__(16) unsigned char memory[];
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  const Place<Element> place(args);
  const int thread = static_cast<int>(threadIdx.x), turns = place.chunks() > 0 ? place.chunks() + 4 : 0;

  for (int i = thread; i < 4 * kChunk * Memory::COLUMNS; i += kThreads)
    (&shared.k[0][0][0])[i] = 0.f;  // and q, which follows
  for (int i = thread; i < place.rows; i += kThreads)
    shared.norm_weight[i] = args.call.norm_weight[place.part * place.rows + i];
  __syncthreads();

  if (thread < kWalkers) {
    Walker<Element, ROW_TILE, VECTORS> walker(place, shared, thread);
    if (!walker.idle()) walker.load();
    for (int turn = 0; turn < turns; turn++) {
      if (turn >= 1 && turn - 1 < place.chunks() && !walker.idle()) walker.walk(turn - 1);
      end_turn(place.parts, turn == 0);
    }
    if (!walker.idle()) walker.store();
  } else if (thread < kWalkers + kConvolvers) {
    Convolver<Element, Memory> convolver(place, shared, thread - kWalkers);
    if (turns > 0) convolver.start();
    for (int turn = 0; turn < turns; turn++) {
      if (turn < place.chunks()) convolver.convolve(turn);
      end_turn(place.parts, turn == 0);
    }
    convolver.store_conv_state();
  } else {
    Writer<Element, Memory> writer(place, shared, thread - kWalkers - kConvolvers);
    if (turns > 0) writer.load_gate(0);
    for (int turn = 0; turn < turns; turn++) {
      if (turn >= 4) {
        writer.write(turn - 4);
        writer.load_gate(turn - 3);
      }
      if (turn >= 2 && turn - 2 < place.chunks()) writer.send_squares(turn - 2);
      end_turn(place.parts, turn == 0);
    }
  }
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  if (place.parts > 1 && turns > 0) cluster_wait();  // each arrival has its wait
#endif

  for (int t = place.length; t < args.call.shape.tokens; t++)
    for (int row = thread; row < place.rows; row += kThreads) place.y(t)[row] = from_float<Element>(0.f);
}

}  // namespace mmm::sequential
