// Chooses the kernel of a matrix product: by the bytes of the weight for few rows of x (linear_vector.cuh), tiled for many
// (linear_matrix.cuh).
#include <algorithm>
#include <atomic>

#include "abi/backend.h"
#include "activations.cuh"
#include "launch.h"
#include "linear_matrix.cuh"

namespace mmm {
namespace {

constexpr int kMostTokens = 8;  // of one launch of the vector kernel: the columns of a matrix instruction

int chunk_inputs(const mmm_linear_shape& shape) {
  return shape.weight_format == MMM_WEIGHT_PLAIN ? 32 : shape.weight_format == MMM_WEIGHT_INT8 ? 64 : 128;
}

// How the vector kernel is spread. `variant` of a call may say, as decimal digits: [spans under way, 1 to 4] [warps a block, 2 digits:
// 08 or 16] [tiles a turn: 1 or 2] [blocks a multiprocessor]; 1 alone: the tiled kernel.
struct Spread {
  int depth, warps, tiles_a_turn, blocks;
};

constexpr int kTiledVariant = 1;

constexpr int kFewTokens = 2;

// The best of a search on an H100 within whole decode steps, at batch 1 and 8, by the shapes of the released model: few tiles with a
// long or a short K (down, out), some (in), many (gate and up), and the head.
Spread best_spread(const mmm_linear_shape& shape, int tokens, const Device& device) {
  const int tiles = (shape.outputs + kTileRows - 1) / kTileRows, processors = device.multiprocessors;
  enum { kDown, kOut, kIn, kGateUp, kHead } place = kHead;
  if (tiles <= processors) place = shape.inputs > 4096 ? kDown : kOut;
  else if (tiles <= 4 * processors) place = kIn;
  else if (tiles <= 8 * processors) place = kGateUp;
  if (shape.epilogue == MMM_EPILOGUE_SILU) place = kGateUp;
  constexpr Spread kFew[3][5] = {{{4, 16, 1, 1}, {2, 16, 2, 1}, {3, 8, 1, 3}, {3, 16, 2, 1}, {2, 16, 1, 2}},
                                 {{3, 16, 1, 1}, {2, 16, 2, 1}, {2, 16, 1, 1}, {2, 16, 2, 1}, {2, 16, 1, 2}},
                                 {{3, 16, 1, 1}, {2, 16, 2, 1}, {3, 16, 2, 1}, {2, 16, 2, 1}, {3, 16, 2, 1}}};
  constexpr Spread kMore[3][5] = {{{2, 16, 1, 1}, {3, 16, 2, 1}, {4, 16, 1, 1}, {3, 16, 2, 1}, {2, 16, 1, 2}},
                                  {{2, 16, 1, 1}, {3, 16, 2, 1}, {2, 16, 1, 1}, {2, 16, 2, 1}, {3, 16, 1, 2}},
                                  {{3, 16, 1, 1}, {3, 16, 2, 1}, {2, 16, 1, 1}, {2, 16, 2, 1}, {2, 16, 2, 1}}};
  return (tokens <= kFewTokens ? kFew : kMore)[shape.weight_format][place];  // formats count from 0: plain, INT8, INT4
}

Spread spread_of(const mmm_linear_args& args, int tokens, const Device& device) {
  if (args.variant == 0) return best_spread(args.shape, tokens, device);
  return {std::clamp(args.variant / 10000 % 10, 1, kMostDepth), args.variant / 100 % 100 == 16 ? 16 : 8,
          args.variant / 10 % 10 == 2 ? 2 : 1, std::clamp(args.variant % 10, 1, 4)};
}

// Rows of x that fit into a block's shared memory beside the rings and the sums, 0 to kMostTokens: `Vector::shared_bytes`, at most.
int tokens_that_fit(const mmm_linear_shape& shape, const Spread& spread, const Device& device) {
  const int R = shape.epilogue == MMM_EPILOGUE_SILU ? 2 : spread.tiles_a_turn;
  const int chunk_sums = shape.weight_format == MMM_WEIGHT_INT4 ? shape.inputs / chunk_inputs(shape) * 32 : 0;
  const int rings = spread.warps * spread.depth * R * kTileRows * (kSpanBytes + 4) + spread.warps * 32 + chunk_sums;
  const int a_token = shape.inputs * 2 + 2 * spread.warps * R * kSumStride * 4;
  return std::clamp((device.shared_memory_per_block - rings) / a_token, 0, kMostTokens);
}

// Gives up spans under way, then warps, then tiles a turn, where a device has less shared memory.
Spread fitted(const mmm_linear_shape& shape, Spread spread, int tokens, const Device& device) {
  while (tokens_that_fit(shape, spread, device) < tokens) {
    if (spread.depth > 2) spread.depth--;
    else if (spread.warps == 16) spread.warps = 8;
    else if (spread.depth > 1) spread.depth--;
    else if (spread.tiles_a_turn == 2) spread.tiles_a_turn = 1;
    else break;
  }
  return spread;
}

bool is_tiled(const mmm_linear_shape& shape, int variant, const Device& device) {
  constexpr Spread kLeast = {1, 8, 1, 1};
  return variant == kTiledVariant || shape.inputs % chunk_inputs(shape) != 0 || tokens_that_fit(shape, kLeast, device) == 0 ||
         (variant == 0 && shape.tokens > 2 * kMostTokens);
}

// Walks the table of kernels, outer type first.
struct Product {
  const mmm_linear_args& call;
  const Device& device;
  Spread spread;
  int first_token, tokens;  // of this launch

  template <typename Element, int FORMAT, int WARPS, int R>
  cudaError_t vector() const {
    return tokens <= kFewTokens ? vector<Element, FORMAT, WARPS, R, true>() : vector<Element, FORMAT, WARPS, R, false>();
  }

  template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
  cudaError_t vector() const {
    using V = Vector<Element, FORMAT, WARPS, R, FEW>;
    const mmm_linear_shape& s = call.shape;
    const auto kernel = linear_vector_kernel<Element, FORMAT, WARPS, R, FEW>;
    const bool silu = s.epilogue == MMM_EPILOGUE_SILU;
    const int64_t columns = silu ? s.outputs / 2 : s.outputs, out_bytes = element_bytes(s.out_dtype);
    VectorArgs a = {};
    a.weight = static_cast<const char*>(call.weight), a.scales = call.scales;
    a.x = static_cast<const Element*>(call.x) + first_token * call.x_stride, a.x_stride = call.x_stride;
    a.norm_weight = s.normalise ? call.norm_weight : nullptr;
    a.residual = s.epilogue == MMM_EPILOGUE_RESIDUAL ? static_cast<const Element*>(call.residual) + first_token * columns : nullptr;
    a.out = static_cast<char*>(call.out) + first_token * columns * out_bytes;
    a.rows = s.outputs, a.chunks = s.inputs / chunk_inputs(s), a.tokens = tokens;
    const int rows_a_tile = silu ? kTileRows : R * kTileRows;
    a.tiles = static_cast<int>((columns + rows_a_tile - 1) / rows_a_tile);
    a.epilogue = s.epilogue, a.depth = spread.depth, a.eps = s.eps;
    a.scales_are_bfloat16 = s.scale_dtype == MMM_BFLOAT16, a.out_is_float32 = s.out_dtype == MMM_FLOAT32;
    a.overlap = device.major >= 9 && call.overlap != 0;

    static std::atomic<uint64_t> prepared{0};  // a bit for each device
    const uint64_t bit = uint64_t{1} << (device.id % 64);
    if (!(prepared.load(std::memory_order_relaxed) & bit)) {
      cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory_per_block);
      // All these kernels ask for the same split of the L1: a multiprocessor drains before it changes that, and nothing would overlap.
      if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
      if (error != cudaSuccess) return error;
      prepared.fetch_or(bit, std::memory_order_relaxed);
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(std::min(a.tiles, spread.blocks * device.multiprocessors));
    config.blockDim = dim3(V::kThreads);
    config.dynamicSmemBytes = V::shared_bytes(tokens, a.chunks, spread.depth);
    config.stream = static_cast<cudaStream_t>(call.stream);
    if (a.overlap) config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
  }

  template <typename Element, int FORMAT>
  cudaError_t vector() const {
    const bool two = call.shape.epilogue == MMM_EPILOGUE_SILU || spread.tiles_a_turn == 2;
    if (spread.warps == 16) return two ? vector<Element, FORMAT, 16, 2>() : vector<Element, FORMAT, 16, 1>();
    return two ? vector<Element, FORMAT, 8, 2>() : vector<Element, FORMAT, 8, 1>();
  }

  template <typename Element, int FORMAT>
  cudaError_t tiled() const {
    const mmm_linear_shape& s = call.shape;
    const auto stream = static_cast<cudaStream_t>(call.stream);
    const bool silu = s.epilogue == MMM_EPILOGUE_SILU;
    MatrixArgs a = {};
    a.weight = static_cast<const char*>(call.weight), a.scales = call.scales;
    a.x = call.x, a.x_stride = call.x_stride;
    a.residual = s.epilogue == MMM_EPILOGUE_RESIDUAL ? call.residual : nullptr;
    a.out = call.out, a.tokens = s.tokens, a.rows = s.outputs, a.inputs = s.inputs, a.epilogue = s.epilogue;
    a.scales_are_bfloat16 = s.scale_dtype == MMM_BFLOAT16, a.out_is_float32 = s.out_dtype == MMM_FLOAT32;
    if (s.normalise) {
      linear_norm_kernel<Element><<<s.tokens, 256, 0, stream>>>(
          static_cast<const Element*>(call.x), call.x_stride, static_cast<const Element*>(call.norm_weight),
          static_cast<Element*>(call.workspace), s.inputs, s.eps);
      a.x = call.workspace, a.x_stride = s.inputs;
    }
    const int rows_a_block = silu ? kBlockRows / 2 : kBlockRows, columns = silu ? s.outputs / 2 : s.outputs;
    const dim3 grid((columns + rows_a_block - 1) / rows_a_block, (s.tokens + kBlockTokens - 1) / kBlockTokens);
    linear_matrix_kernel<Element, FORMAT><<<grid, kMatrixThreads, 0, stream>>>(a);
    return cudaGetLastError();
  }

  template <typename Element, int FORMAT>
  cudaError_t by_kernel() const {
    return tokens == 0 ? tiled<Element, FORMAT>() : vector<Element, FORMAT>();
  }

  template <typename Element>
  cudaError_t by_format() const {
    switch (call.shape.weight_format) {
      case MMM_WEIGHT_INT8: return by_kernel<Element, MMM_WEIGHT_INT8>();
      case MMM_WEIGHT_INT4: return by_kernel<Element, MMM_WEIGHT_INT4>();
      default: return by_kernel<Element, MMM_WEIGHT_PLAIN>();
    }
  }

  cudaError_t enqueue() const {
    return call.shape.io_dtype == MMM_FLOAT16 ? by_format<__half>() : by_format<__nv_bfloat16>();
  }
};

cudaError_t enqueue(const mmm_linear_args& args, const Device& device) {
  const mmm_linear_shape& shape = args.shape;
  const int most = std::min(kMostTokens, shape.tokens);
  Product product = {args, device, fitted(shape, spread_of(args, most, device), most, device), 0, 0};
  if (is_tiled(shape, args.variant, device)) return product.enqueue();
  const int fit = tokens_that_fit(shape, product.spread, device);
  for (int first = 0; first < shape.tokens; first += fit) {
    product.first_token = first, product.tokens = std::min(fit, shape.tokens - first);
    if (const cudaError_t error = product.enqueue()) return error;
  }
  return cudaSuccess;
}

uint64_t normalised_bytes(const mmm_linear_shape& shape) {
  const uint64_t bytes = uint64_t{2} * static_cast<uint64_t>(shape.tokens) * static_cast<uint64_t>(shape.inputs);
  return shape.normalise ? (bytes + 255) / 256 * 256 : 0;  // what follows is aligned too
}

template <typename Element>
cudaError_t enqueue(const mmm_linear_args& args, const ForeignProduct& product) {
  const mmm_linear_shape& s = args.shape;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const bool is_silu = s.epilogue == MMM_EPILOGUE_SILU, adds = s.epilogue == MMM_EPILOGUE_RESIDUAL;
  const void* x = args.x;
  if (s.normalise) {
    linear_norm_kernel<Element><<<s.tokens, 256, 0, stream>>>(
        static_cast<const Element*>(args.x), args.x_stride, static_cast<const Element*>(args.norm_weight),
        static_cast<Element*>(args.workspace), s.inputs, s.eps);
    x = args.workspace;
  }
  if (adds && args.out != args.residual) {
    const size_t bytes = static_cast<size_t>(s.tokens) * static_cast<size_t>(s.outputs) * sizeof(Element);
    if (const cudaError_t error = cudaMemcpyAsync(args.out, args.residual, bytes, cudaMemcpyDeviceToDevice, stream)) return error;
  }
  void* const to = is_silu ? static_cast<char*>(args.workspace) + normalised_bytes(s) : args.out;
  if (!product.enqueue(s, x, args.weight, to, is_silu ? s.io_dtype : s.out_dtype, adds)) return cudaErrorUnknown;
  if (is_silu) {
    const int64_t eighths = int64_t{s.tokens} * (s.outputs / 2) / 8;
    linear_silu_kernel<Element><<<static_cast<unsigned>((eighths + 255) / 256), 256, 0, stream>>>(
        static_cast<const Element*>(to), args.out, eighths, s.outputs / 2, s.out_dtype == MMM_FLOAT32);
  }
  return cudaGetLastError();
}

}  // namespace

uint64_t linear_workspace_cuda(const mmm_linear_shape& shape, const ForeignProduct&) {
  const uint64_t products = uint64_t{2} * static_cast<uint64_t>(shape.tokens) * static_cast<uint64_t>(shape.outputs);
  return normalised_bytes(shape) + (shape.epilogue == MMM_EPILOGUE_SILU ? products : 0);
}

int32_t linear_cuda(const mmm_linear_args& args, const ForeignProduct& product, mmm_status& status) {
  Device device = {};
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) {
    error = args.shape.io_dtype == MMM_FLOAT16 ? enqueue<__half>(args, product) : enqueue<__nv_bfloat16>(args, product);
  }
  if (error == cudaSuccess) return MMM_OK;
  cudaGetLastError();
  return cuda_failed(status, error, device);
}

uint64_t linear_workspace_cuda(const mmm_linear_shape& shape) {
  // Whichever kernel is chosen: a forced variant may be tiled for few tokens too.
  return shape.normalise ? uint64_t{2} * static_cast<uint64_t>(shape.tokens) * static_cast<uint64_t>(shape.inputs) : 0;
}

int32_t linear_cuda(const mmm_linear_args& args, mmm_status& status) {
  Device device = {};
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = enqueue(args, device);
  if (error == cudaSuccess) return MMM_OK;
  cudaGetLastError();  // leave no error behind for the caller's next check
  return cuda_failed(status, error, device);
}

}  // namespace mmm
