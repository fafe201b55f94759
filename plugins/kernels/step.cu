// Chooses the decode step's kernel: how many blocks share a head, and the sizes and types that kernels are built for.
#include "launch.h"
#include "step.cuh"

namespace mmm {
namespace {

constexpr int kMostParts = 8;      // the largest cluster that every device can hold
constexpr int kGridLimit = 65535;  // of y and z

// How a head is spread: automatic where 0. For tuning, segments may say 10 * threads a block + blocks a head, with
// 0 in either place. Thread counts other than the automatic one exist in builds with MMM_STEP_VARIANTS only; a spread without a
// kernel goes to launch_sequential, as an odd shape does.
struct Spread {
  int parts, threads;
};

Spread spread_of(const mmm_scan_args& args, const Device& device) {
  const mmm_scan_shape& shape = args.shape;
  Spread spread = {args.segments % 10, args.segments / 10};
  if (device.major < 9) spread.parts = 1;
  if (spread.parts != 0) return spread;
  spread.parts = kMostParts;
  const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads;
  while (spread.parts > 1 && (heads * spread.parts > 2 * device.multiprocessors || shape.head_dim / spread.parts < 16))
    spread.parts /= 2;
  return spread;
}

// Walks the table of kernels, outer type first, and enqueues the one that fits, if there is one.
struct Launch {
  const mmm_scan_args& call;
  const Device& device;
  Spread spread;
  bool found = false;
  cudaError_t error = cudaSuccess;

  template <class Step>
  void enqueue() {
    const mmm_scan_shape& shape = call.shape;
    StepArgs args = {};
    args.projected = call.projected, args.conv_state = call.conv_state, args.ssm_state = call.ssm_state;
    args.y = call.y, args.conv_state_out = call.conv_state_out, args.ssm_state_out = call.ssm_state_out;
    args.lengths = call.lengths, args.conv_weight = call.conv_weight, args.conv_bias = call.conv_bias;
    args.dt_bias = call.dt_bias, args.A_log = call.A_log, args.norm_weight = call.norm_weight;
    args.batch_stride = call.projected_batch_stride, args.heads = shape.heads, args.kv_heads = shape.kv_heads;
    args.group_heads = shape.heads / shape.kv_heads, args.conv_width = shape.conv_width, args.eps = shape.eps,
    args.overlap = device.major >= 9 && call.overlap != 0;

    constexpr unsigned parts = Step::PARTS;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(parts * static_cast<unsigned>(args.group_heads), shape.kv_heads, shape.batch);
    config.blockDim = dim3(Step::THREADS);
    config.stream = static_cast<cudaStream_t>(call.stream);
    config.attrs = attributes;
    if (parts > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = parts, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    }
    if (args.overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    error = cudaLaunchKernelEx(&config, step_kernel<Step>, args);
    found = true;
  }

  // The table: a warp takes at least one access of 512 bytes, a block has 8 warps where there is work for them.
  template <typename Element, typename State, int P, int N, int OLD_TAPS, int PARTS>
  void choose_warps() {
    constexpr int kAccesses = P / PARTS * N * static_cast<int>(sizeof(State)) / 512;
    constexpr int kWarps = kAccesses < 8 ? kAccesses : 8;
    if (spread.threads == 0 || spread.threads == 32 * kWarps)
      return enqueue<Step<Element, State, P, N, OLD_TAPS, PARTS, kWarps>>();
#ifdef MMM_STEP_VARIANTS
    if constexpr (sizeof(Element) == 2 && sizeof(State) == 4 && P == 128 && N == 128 && OLD_TAPS == 1) {
      if constexpr (PARTS > 1)
        if (spread.threads == 128) return enqueue<Step<Element, State, P, N, OLD_TAPS, PARTS, 4>>();
      if (spread.threads == 512) return enqueue<Step<Element, State, P, N, OLD_TAPS, PARTS, 16>>();
    }
#endif
  }

  template <typename Element, typename State, int P, int N, int OLD_TAPS>
  void choose_parts() {
    if (spread.parts == 1) return choose_warps<Element, State, P, N, OLD_TAPS, 1>();
    if (spread.parts == 2) return choose_warps<Element, State, P, N, OLD_TAPS, 2>();
    if (spread.parts == 4) return choose_warps<Element, State, P, N, OLD_TAPS, 4>();
    if constexpr (P == 128)
      if (spread.parts == 8) return choose_warps<Element, State, P, N, OLD_TAPS, 8>();
  }

  // A float32 state and conv width 2, the usual case, are worth kernels without the other widths' branches.
  template <typename Element, typename State, int P, int N>
  void choose_taps() {
    if constexpr (sizeof(State) == 4)
      if (call.shape.conv_width == 2) return choose_parts<Element, State, P, N, 1>();
    choose_parts<Element, State, P, N, 3>();
  }

  template <typename Element, typename State>
  void choose_size() {
    const int P = call.shape.head_dim, N = call.shape.state_dim;
    if (P == 128 && N == 128) return choose_taps<Element, State, 128, 128>();
    if (P == 64 && N == 64) return choose_taps<Element, State, 64, 64>();
    if (P == 64 && N == 128) return choose_taps<Element, State, 64, 128>();
    if (P == 128 && N == 64) return choose_taps<Element, State, 128, 64>();
  }

  template <typename Element>
  void choose_state() {
    if (call.shape.state_dtype == MMM_FLOAT32) return choose_size<Element, float>();
    if (call.shape.state_dtype == MMM_FLOAT16) return choose_size<Element, __half>();
    if (call.shape.state_dtype == MMM_BFLOAT16) return choose_size<Element, __nv_bfloat16>();
  }

  void choose() {
    if (call.shape.kv_heads > kGridLimit || call.shape.batch > kGridLimit) return;
    if (call.shape.io_dtype == MMM_FLOAT32) return choose_state<float>();
    if (call.shape.io_dtype == MMM_FLOAT16) return choose_state<__half>();
    if (call.shape.io_dtype == MMM_BFLOAT16) return choose_state<__nv_bfloat16>();
  }
};

}  // namespace

cudaError_t launch_step(const mmm_scan_args& args, const Device& device) {
  if (args.shape.batch == 0) return cudaSuccess;
  Launch launch = {args, device, spread_of(args, device)};
  launch.choose();
  if (launch.found) return launch.error;
  mmm_scan_args other = args;
  other.segments = 0;  // the other kernel's spread is its own matter
  return launch_sequential(other, device);
}

}  // namespace mmm
