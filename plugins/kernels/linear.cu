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
  const mmm_linear_args* kept;  // the call's rows that are no integers, as a product of their own; or NULL
  const Device& device;
  Spread spread;
  int out_stride;           // of out and residual, in elements
  int first_token, tokens;  // of this launch

  template <typename Element>
  VectorArgs vector_args(const mmm_linear_args& from, int tiles_a_turn) const {
    const mmm_linear_shape& s = from.shape;
    const bool silu = s.epilogue == MMM_EPILOGUE_SILU;
    const int64_t columns = silu ? s.outputs / 2 : s.outputs, first_out = int64_t{first_token} * out_stride;
    VectorArgs a = {};
    a.weight = static_cast<const char*>(from.weight), a.scales = from.scales;
    a.x = static_cast<const Element*>(from.x) + first_token * from.x_stride, a.x_stride = from.x_stride;
    a.norm_weight = s.normalise ? from.norm_weight : nullptr;
    a.residual = s.epilogue == MMM_EPILOGUE_RESIDUAL ? static_cast<const Element*>(from.residual) + first_out : nullptr;
    a.out = static_cast<char*>(from.out) + first_out * element_bytes(s.out_dtype), a.out_stride = out_stride;
    a.rows = s.outputs, a.chunks = s.inputs / chunk_inputs(s), a.tokens = tokens;
    const int rows_a_tile = silu ? kTileRows : tiles_a_turn * kTileRows;
    a.tiles = static_cast<int>((columns + rows_a_tile - 1) / rows_a_tile);
    a.epilogue = s.epilogue, a.depth = spread.depth, a.eps = s.eps;
    a.scales_are_bfloat16 = s.scale_dtype == MMM_BFLOAT16, a.out_is_float32 = s.out_dtype == MMM_FLOAT32;
    a.overlap = device.major >= 9 && from.overlap != 0;
    return a;
  }

  // `prepared` has a bit for each device that knows `kernel`.
  template <typename Kernel, typename... Args>
  cudaError_t launch(Kernel kernel, std::atomic<uint64_t>& prepared, int blocks, int threads, int shared_bytes, Args... args) const {
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
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(call.stream);
    if (device.major >= 9 && call.overlap != 0) config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
  }

  template <typename Element, int FORMAT, int WARPS, int R>
  cudaError_t vector() const {
    return tokens <= kFewTokens ? vector<Element, FORMAT, WARPS, R, true>() : vector<Element, FORMAT, WARPS, R, false>();
  }

  template <typename Element, int FORMAT, int WARPS, int R, bool FEW>
  cudaError_t vector() const {
    using V = Vector<Element, FORMAT, WARPS, R, FEW>;
    const VectorArgs a = vector_args<Element>(call, R);
    const int most = spread.blocks * device.multiprocessors, shared_bytes = V::shared_bytes(tokens, a.chunks, spread.depth);
    if constexpr (FORMAT != MMM_WEIGHT_PLAIN) {
      if (kept != nullptr) {
        using Kept = Vector<Element, MMM_WEIGHT_PLAIN, WARPS, 1, FEW>;
        const VectorArgs rows = vector_args<Element>(*kept, 1);
        const int blocks = rows.tiles + std::min(a.tiles, std::max(1, most - rows.tiles));
        static std::atomic<uint64_t> prepared{0};
        return launch(linear_vector_kept_kernel<Element, FORMAT, WARPS, R, FEW>, prepared, blocks, V::kThreads,
                      std::max(shared_bytes, Kept::shared_bytes(tokens, rows.chunks, spread.depth)), a, rows);
      }
    }
    static std::atomic<uint64_t> prepared{0};
    return launch(linear_vector_kernel<Element, FORMAT, WARPS, R, FEW>, prepared, std::min(a.tiles, most), V::kThreads, shared_bytes, a);
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
    a.out = call.out, a.out_stride = out_stride, a.tokens = s.tokens, a.rows = s.outputs, a.inputs = s.inputs, a.epilogue = s.epilogue;
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

// Enqueues the rows of one format, and with few tokens those of `kept` beside them, into `out_stride` elements a token.
cudaError_t enqueue_rows(const mmm_linear_args& args, const mmm_linear_args* kept, int out_stride, const Device& device) {
  const mmm_linear_shape& shape = args.shape;
  const int most = std::min(kMostTokens, shape.tokens);
  Product product = {args, kept, device, fitted(shape, spread_of(args, most, device), most, device), out_stride, 0, 0};
  if (is_tiled(shape, args.variant, device)) {
    if (kept != nullptr) {
      if (const cudaError_t error = enqueue_rows(*kept, nullptr, out_stride, device)) return error;
    }
    return product.enqueue();
  }
  const int fit = tokens_that_fit(shape, product.spread, device);
  for (int first = 0; first < shape.tokens; first += fit) {
    product.first_token = first, product.tokens = std::min(fit, shape.tokens - first);
    if (const cudaError_t error = product.enqueue()) return error;
  }
  return cudaSuccess;
}

cudaError_t enqueue(const mmm_linear_args& args, const Device& device) {
  const mmm_linear_shape& shape = args.shape;
  const int out_stride = static_cast<int>(linear_columns(shape)), quantized = shape.outputs - shape.kept;
  mmm_linear_args rest = args, kept = args;
  rest.shape.outputs = quantized, rest.shape.kept = 0;
  if (shape.kept == 0) return enqueue_rows(rest, nullptr, out_stride, device);
  kept.shape.weight_format = MMM_WEIGHT_PLAIN, kept.shape.outputs = shape.kept, kept.shape.kept = 0;
  kept.weight = args.kept_weight, kept.scales = nullptr, kept.variant = 0;
  kept.out = static_cast<char*>(args.out) + int64_t{quantized} * element_bytes(shape.out_dtype);
  if (args.residual != nullptr) kept.residual = static_cast<const char*>(args.residual) + int64_t{quantized} * element_bytes(shape.io_dtype);
  return enqueue_rows(rest, &kept, out_stride, device);
}

// Of gate and up, whose products lie in the workspace until they are multiplied: so few that they are still in the L2.
constexpr int kSiluTokens = 1024;

int silu_tokens(const mmm_linear_shape& shape) { return std::min(shape.tokens, kSiluTokens); }

// Bytes of (rows, columns) 16-bit elements, rounded up so that what follows is aligned too.
uint64_t matrix_bytes(int rows, int columns) {
  return (uint64_t{2} * static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) + 255) / 256 * 256;
}

// The parts of a workspace for a foreign product, one behind the other.
struct ForeignWorkspace {
  uint64_t normalised, products, widened;  // bytes: x; gate and up of some tokens; the weight

  explicit ForeignWorkspace(const mmm_linear_shape& s)
      : normalised(s.normalise ? matrix_bytes(s.tokens, s.inputs) : 0),
        products(s.epilogue == MMM_EPILOGUE_SILU ? matrix_bytes(silu_tokens(s), s.outputs) : 0),
        widened(s.weight_format != MMM_WEIGHT_PLAIN ? matrix_bytes(s.outputs, s.inputs) : 0) {}

  uint64_t bytes() const { return normalised + products + widened; }
};

template <typename Element>
cudaError_t enqueue_widened(const mmm_linear_args& args, void* widened) {
  const mmm_linear_shape& s = args.shape;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int64_t eighths = int64_t{s.outputs - s.kept} * s.inputs / 8;
  const auto kernel = s.weight_format == MMM_WEIGHT_INT8 ? linear_widen_kernel<Element, MMM_WEIGHT_INT8>
                                                         : linear_widen_kernel<Element, MMM_WEIGHT_INT4>;
  kernel<<<static_cast<unsigned>((eighths + 255) / 256), 256, 0, stream>>>(
      static_cast<const char*>(args.weight), args.scales, static_cast<uint4*>(widened), eighths, s.inputs,
      s.scale_dtype == MMM_BFLOAT16);
  if (s.kept == 0) return cudaGetLastError();
  return cudaMemcpyAsync(static_cast<uint4*>(widened) + eighths, args.kept_weight,
                         static_cast<size_t>(s.kept) * static_cast<size_t>(s.inputs) * sizeof(Element), cudaMemcpyDeviceToDevice, stream);
}

template <typename Element>
cudaError_t enqueue_silu(const mmm_linear_args& args, const void* x, const void* weight, void* products, const ForeignProduct& product) {
  const int columns = args.shape.outputs / 2, out_bytes = element_bytes(args.shape.out_dtype);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  mmm_linear_shape part = args.shape;
  for (int first = 0; first < args.shape.tokens; first += part.tokens) {
    part.tokens = std::min(silu_tokens(args.shape), args.shape.tokens - first);
    const Element* const from = static_cast<const Element*>(x) + int64_t{first} * args.shape.inputs;
    if (!product.enqueue(part, from, weight, products, part.io_dtype, false)) return cudaErrorUnknown;
    const int64_t eighths = int64_t{part.tokens} * columns / 8;
    linear_silu_kernel<Element><<<static_cast<unsigned>((eighths + 255) / 256), 256, 0, stream>>>(
        static_cast<const Element*>(products), static_cast<char*>(args.out) + int64_t{first} * columns * out_bytes, eighths, columns,
        args.shape.out_dtype == MMM_FLOAT32);
  }
  return cudaGetLastError();
}

template <typename Element>
cudaError_t enqueue(const mmm_linear_args& args, const ForeignProduct& product) {
  const mmm_linear_shape& s = args.shape;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const bool is_silu = s.epilogue == MMM_EPILOGUE_SILU, adds = s.epilogue == MMM_EPILOGUE_RESIDUAL;
  const ForeignWorkspace workspace(s);
  char* const normalised = static_cast<char*>(args.workspace);
  char* const products = normalised + workspace.normalised;
  const void *x = args.x, *weight = args.weight;
  if (s.weight_format != MMM_WEIGHT_PLAIN) {
    weight = products + workspace.products;
    if (const cudaError_t error = enqueue_widened<Element>(args, products + workspace.products)) return error;
  }
  if (s.normalise) {
    linear_norm_kernel<Element><<<s.tokens, 256, 0, stream>>>(
        static_cast<const Element*>(args.x), args.x_stride, static_cast<const Element*>(args.norm_weight),
        reinterpret_cast<Element*>(normalised), s.inputs, s.eps);
    x = normalised;
  }
  if (adds && args.out != args.residual) {
    const size_t bytes = static_cast<size_t>(s.tokens) * static_cast<size_t>(s.outputs) * sizeof(Element);
    if (const cudaError_t error = cudaMemcpyAsync(args.out, args.residual, bytes, cudaMemcpyDeviceToDevice, stream)) return error;
  }
  if (is_silu) return enqueue_silu<Element>(args, x, weight, products, product);
  if (!product.enqueue(s, x, weight, args.out, s.out_dtype, adds)) return cudaErrorUnknown;
  return cudaGetLastError();
}

}  // namespace

uint64_t linear_workspace_cuda(const mmm_linear_shape& shape, const ForeignProduct&) { return ForeignWorkspace(shape).bytes(); }

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
