// Prefill by chunks: three launches on one stream, or one when a sequence is not cut into segments.
//   pass 1  what each segment but the last adds to the state, all segments at once
//   pass 2  each segment's start state
//   pass 3  each segment's output from its start state; the last one's end state
// No flags, no atomics: deterministic, and safe to capture. On sm_90 and newer the passes overlap by programmatic launch. Pairs of
// heads of 128 have passes 1 and 3 of their own there (chunked_hopper.cu), and short prompts no passes at all (short.cu).
#include "chunked_launch.cuh"
#include "chunked_scan.cuh"
#include "kernel_launch.cuh"
#include "launch.h"

namespace mmm {
namespace {

// Head-segments that a workspace may have to hold: fills 150 processors with two heads each, and bounds the memory to 21 MB.
constexpr int64_t kMostSegments = 320;

template <typename Element, class C>
__global__ void __launch_bounds__(C::THREADS) chunked_kernel(const __grid_constant__ ChunkedArgs args) {
#if __CUDA_ARCH__ < 1000 || __CUDA_ARCH__ >= 1200
  if constexpr (C::HEADS > 1) return;  // never launched there: a block has less shared memory, or chunked_hopper.cu does it
#endif
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  ChunkedScan<Element, C> scan(args, shared);
  const Place& place = scan.place;
  if (C::STATE_ONLY) let_next_kernel_start();
  if (place.begin >= place.end) {  // nothing valid here
    if (C::STATE_ONLY) return;
    scan.clear_padding(place.begin);
    if (place.segment > 0) return;
    if (args.segments > 1) wait_for_previous_kernel();
    scan.load(args.segments > 1 ? args.segment_states : args.ssm_state, args.segments > 1 ? MMM_FLOAT32 : args.state_dtype,
              args.segments > 1 ? scan.segment_index() : scan.state_index());
    scan.store(args.ssm_state_out, args.state_dtype, scan.state_index());
    scan.write_conv_state();
    return;
  }

  using Rows = typename Either<C::STAGED, StagedRows<Element, C>, HeldRows<Element, C>>::Type;
  Rows rows(shared, args, place, scan.channels);
  commit_copies();
  if constexpr (!C::STATE_ONLY) scan.prefetch_gate(place.begin);
  commit_copies();
  load_taps<C>(shared, args, place);
  scan.prefetch_dt(place.begin);
  if (C::STATE_ONLY) {
#pragma unroll
    for (int m = 0; m < C::BANDS; m++)
#pragma unroll
      for (int j = 0; j < C::D / 8; j++) scan.S[m][j][0] = scan.S[m][j][1] = scan.S[m][j][2] = scan.S[m][j][3] = 0.f;
  } else if (args.segments == 1) {
    scan.load(args.ssm_state, args.state_dtype, scan.state_index());
  } else {
    wait_for_previous_kernel();
    scan.load(args.segment_states, MMM_FLOAT32, scan.segment_index());
  }

  for (int begin = place.begin; begin < place.end; begin += kChunk) {
    const bool more = begin + kChunk < place.end;
    wait_copies<1>();  // the raw rows are here; the gate may still be on its way
    __syncthreads();   // ... everybody's; and the tiles of the chunk before are no longer read
    scan.prepare_decays();
    convolve<Element, C>(shared, rows);
    __syncthreads();
    if (more) {
      rows.next(args, place);
      scan.prefetch_dt(begin + kChunk);
    }
    commit_copies();
    float y[4][C::COLUMNS][4];
    if constexpr (!C::STATE_ONLY) {
      scan.mask_product();
      scan.read_state(y);
      scan.head_barrier();
      scan.add_within_chunk(y);
    }
    scan.update_state();
    if constexpr (!C::STATE_ONLY) {
      scan.sum_squares(y);
      wait_copies<1>();  // the gate is here
      scan.head_barrier();
      scan.write(y, begin);
      if (more) scan.prefetch_gate(begin + kChunk);
    }
    commit_copies();
  }

  if constexpr (C::STATE_ONLY) {
    scan.store(args.segment_states, MMM_FLOAT32, scan.segment_index());
    if (scan.warp == 0 && scan.lane == 0)
      args.segment_decays[(static_cast<int64_t>(place.batch) * args.heads + scan.head) * args.segments + place.segment] = scan.total;
  } else {
    scan.clear_padding(place.begin + (place.end - place.begin + kChunk - 1) / kChunk * kChunk);
    if (place.end == place.length) {
      scan.store(args.ssm_state_out, args.state_dtype, scan.state_index());
      scan.write_conv_state();
    }
  }
}

// Pass 2: what segments add -> their start states, in place. A thread owns 4 entries of a head's state; grid (P*N/512, B*H).
// FRAGMENTS: segments lie in the order of chunked_hopper.cuh, else as the state itself.
template <bool FRAGMENTS>
__global__ void __launch_bounds__(128) start_states(const __grid_constant__ ChunkedArgs args, int state_entries) {
  constexpr int kAhead = 16;  // segments loaded before the first is used
  const int head = blockIdx.y, entry = (blockIdx.x * 128 + threadIdx.x) * 4;
  const int filled = max(1, (args.length(head / args.heads) + args.segment_tokens - 1) / args.segment_tokens);
  let_next_kernel_start();
  const int64_t state = static_cast<int64_t>(head) * state_entries;
  const int64_t at = state + (FRAGMENTS ? fragment_entry(entry / 4) : entry), next = at + (FRAGMENTS ? 8 * 128 : 2);
  const float2 low = load_state(args.ssm_state, args.state_dtype, at), high = load_state(args.ssm_state, args.state_dtype, next);
  float4 carry = make_float4(low.x, low.y, high.x, high.y);
  float* const states = args.segment_states + static_cast<int64_t>(head) * args.segments * state_entries + entry;
  const float* const decays = args.segment_decays + static_cast<int64_t>(head) * args.segments;
  wait_for_previous_kernel();
  for (int first = 0; first < filled; first += kAhead) {
    float4 added[kAhead];
    float decay[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const bool last = first + i + 1 >= filled;
      added[i] = last ? make_float4(0.f, 0.f, 0.f, 0.f)
                      : *reinterpret_cast<const float4*>(states + static_cast<int64_t>(first + i) * state_entries);
      decay[i] = last ? 0.f : decays[first + i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++)
      if (first + i < filled) {
        *reinterpret_cast<float4*>(states + static_cast<int64_t>(first + i) * state_entries) = carry;
        const float d = exp2_fast(decay[i]);
        carry = make_float4(fmaf(carry.x, d, added[i].x), fmaf(carry.y, d, added[i].y), fmaf(carry.z, d, added[i].z),
                            fmaf(carry.w, d, added[i].w));
      }
  }
}

template <typename Element, int D, int HEADS, int TAPS>
cudaError_t run(ChunkedArgs& args, int batch, cudaStream_t stream, const Device& device) {
  using Pass1 = Chunked<Element, D, HEADS, TAPS, true>;
  using Pass3 = Chunked<Element, D, HEADS, TAPS, false>;
  constexpr auto pass1 = chunked_kernel<Element, Pass1>, pass3 = chunked_kernel<Element, Pass3>;
  const dim3 blocks(args.segments, args.heads / HEADS, batch), but_last(args.segments - 1, args.heads / HEADS, batch);
  const bool overlap = device.major >= 9, cut = args.segments > 1;
  cudaError_t error = allow_shared_memory<pass3>(sizeof(typename Pass3::Shared));
  if (error == cudaSuccess && cut) {
    error = allow_shared_memory<pass1>(sizeof(typename Pass1::Shared));
    if (error == cudaSuccess)
      error = launch(pass1, {but_last, Pass1::THREADS, sizeof(typename Pass1::Shared), stream}, args);
    if (error == cudaSuccess) error = launch_start_states(args, D * D, batch, stream, overlap, false);
  }
  if (error != cudaSuccess) return error;
  return launch(pass3, {blocks, Pass3::THREADS, sizeof(typename Pass3::Shared), stream, overlap && cut}, args);
}

template <typename Element, int TAPS>
cudaError_t run_sizes(ChunkedArgs& args, int head_dim, int heads_per_block, int batch, cudaStream_t stream, const Device& device) {
  if (head_dim == 64) return run<Element, 64, 1, TAPS>(args, batch, stream, device);
  if constexpr (TAPS == 2)
    if (heads_per_block == 2) return run<Element, 128, 2, TAPS>(args, batch, stream, device);
  return run<Element, 128, 1, TAPS>(args, batch, stream, device);
}

int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// Two heads a block where that much shared memory exists (sm_90): they share k, v and their convolution.
int heads_per_block(const mmm_scan_shape& shape, const Device& device) {
  const bool fits = device.shared_memory_per_block >= static_cast<int>(sizeof(Chunked<__half, 128, 2, 2, false>::Shared));
  return shape.head_dim == 128 && shape.conv_width == 2 && fits && shape.heads / shape.kv_heads % 2 == 0 ? 2 : 1;
}

}  // namespace

cudaError_t launch_start_states(const ChunkedArgs& args, int state_entries, int batch, cudaStream_t stream, bool overlap,
                                bool fragments) {
  const Launch how = {dim3(state_entries / 512, batch * args.heads), 128, 0, stream, overlap};
  return launch(fragments ? start_states<true> : start_states<false>, how, args, state_entries);
}

bool chunked_supports(const mmm_scan_shape& shape) {
  return (shape.io_dtype == MMM_FLOAT16 || shape.io_dtype == MMM_BFLOAT16) && shape.head_dim == shape.state_dim &&
         (shape.head_dim == 64 || shape.head_dim == 128) && shape.tokens > 0;
}

uint64_t chunked_workspace(const mmm_scan_shape& shape) {
  int64_t chunks = chunks_of(shape.tokens);
  if (chunks < 2) chunks = shape.head_dim == 128 ? 2 : 0;  // one segment needs none, but run_short does
  const int64_t rows = static_cast<int64_t>(shape.batch) * shape.heads;
  if (chunks == 0) return 0;
  const int64_t states = rows > kMostSegments / chunks ? kMostSegments : rows * chunks;
  return static_cast<uint64_t>(states) * (shape.head_dim * shape.state_dim + 1) * sizeof(float);
}

cudaError_t launch_chunked(const mmm_scan_args& call, const Device& device) {
  const mmm_scan_shape& shape = call.shape;
  const int64_t chunks = chunks_of(shape.tokens), rows = static_cast<int64_t>(shape.batch) * shape.heads;
  const int together = heads_per_block(shape, device);
  const int blocks_per_processor = shape.head_dim == 64 ? 2 : 1;
  int64_t segments = call.segments;
  if (segments <= 0) {
    segments = device.multiprocessors * blocks_per_processor * together / rows;
    if (rows * segments > kMostSegments) segments = kMostSegments / rows;
    if (chunks < 4) segments = 1;
  }
  const int64_t room = static_cast<int64_t>(call.workspace_bytes / ((shape.head_dim * shape.state_dim + 1) * sizeof(float)));
  if (rows * segments > room) segments = room / rows;
  segments = segments < 1 ? 1 : segments > chunks ? chunks : segments;
  const int64_t each = (chunks + segments - 1) / segments;

  ChunkedArgs args = {};
  args.projected = call.projected, args.batch_stride = call.projected_batch_stride, args.token_stride = call.projected_token_stride;
  args.lengths = call.lengths, args.conv_state = call.conv_state, args.ssm_state = call.ssm_state;
  args.conv_weight = call.conv_weight, args.conv_bias = call.conv_bias, args.dt_bias = call.dt_bias, args.A_log = call.A_log;
  args.norm_weight = call.norm_weight, args.y = call.y, args.conv_state_out = call.conv_state_out;
  args.ssm_state_out = call.ssm_state_out, args.tokens = shape.tokens, args.heads = shape.heads, args.kv_heads = shape.kv_heads;
  args.conv_width = shape.conv_width, args.state_dtype = shape.state_dtype, args.eps = shape.eps;
  args.segments = static_cast<int>((chunks + each - 1) / each), args.segment_tokens = static_cast<int>(each * kChunk);
  args.segment_states = static_cast<float*>(call.workspace);
  args.segment_decays = args.segment_states + rows * args.segments * shape.head_dim * shape.state_dim;

  const auto stream = static_cast<cudaStream_t>(call.stream);
  const bool half = shape.io_dtype == MMM_FLOAT16;
  const bool is_short = chunks <= kMostShortChunks && short_blocks(shape) <= device.multiprocessors &&
                        short_workspace(shape) <= call.workspace_bytes;
  if (device.major == 9 && shape.head_dim == 128 && call.segments <= 0 && is_short)
    return run_short(args, call.workspace, half, shape.batch, stream);
  if (together == 2 && device.major == 9) return run_warpgroups(args, half, shape.batch, stream);
  const bool narrow = shape.conv_width == 2;
  if (shape.io_dtype == MMM_FLOAT16)
    return narrow ? run_sizes<__half, 2>(args, shape.head_dim, together, shape.batch, stream, device)
                  : run_sizes<__half, 4>(args, shape.head_dim, together, shape.batch, stream, device);
  return narrow ? run_sizes<__nv_bfloat16, 2>(args, shape.head_dim, together, shape.batch, stream, device)
                : run_sizes<__nv_bfloat16, 4>(args, shape.head_dim, together, shape.batch, stream, device);
}

}  // namespace mmm
