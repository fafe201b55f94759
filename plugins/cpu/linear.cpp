// Matrix products as kernels.h writes them, in float: blocks of inputs of a few tokens are made floats and normalised, then rows of
// the weight are made floats, one at a time, and multiplied with each of these tokens.
#include <algorithm>
#include <cmath>

#include "abi/backend.h"
#include "cpu/activations.h"
#include "cpu/number_formats.h"
#include "cpu/reference.h"

namespace mmm {
namespace {

constexpr int64_t kBlock = 512;  // inputs at a time; a multiple of MMM_INT4_GROUP
constexpr int64_t kTokens = 8;
constexpr int64_t kLanes = 16;

float float_of(const void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case MMM_FLOAT16: return float_from_float16(static_cast<const uint16_t*>(data)[index]);
    case MMM_BFLOAT16: return float_from_bfloat16(static_cast<const uint16_t*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

float rounded(float value, int32_t dtype) {
  switch (dtype) {
    case MMM_FLOAT16: return float_from_float16(float16_from_float(value));
    case MMM_BFLOAT16: return float_from_bfloat16(bfloat16_from_float(value));
    default: return value;
  }
}

void store_float(float value, void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case MMM_FLOAT16: static_cast<uint16_t*>(data)[index] = float16_from_float(value); return;
    case MMM_BFLOAT16: static_cast<uint16_t*>(data)[index] = bfloat16_from_float(value); return;
    default: static_cast<float*>(data)[index] = value;
  }
}

// `count` elements that begin at `offset`, as floats. Loops over one type, so that they vectorise.
void load_floats(const void* data, int32_t dtype, int64_t offset, int64_t count, float* __restrict out) {
  switch (dtype) {
    case MMM_FLOAT16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_float16(from[i]);
      return;
    }
    case MMM_BFLOAT16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(from[i]);
      return;
    }
    default: {
      const float* from = static_cast<const float*>(data) + offset;
      std::copy(from, from + count, out);
    }
  }
}

// Inputs [first, first + count) of row `row` of the weight, without the scale of INT8, which the sums take.
void load_weights(const mmm_linear_args& args, int64_t row, int64_t first, int64_t count, float* __restrict out) {
  const mmm_linear_shape& s = args.shape;
  const int64_t quantized = s.outputs - s.kept;
  if (row >= quantized && s.kept > 0) return load_floats(args.kept_weight, s.io_dtype, (row - quantized) * s.inputs + first, count, out);
  const int64_t offset = row * s.inputs + first;
  switch (s.weight_format) {
    case MMM_WEIGHT_INT8: {
      const int8_t* from = static_cast<const int8_t*>(args.weight) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(from[i]);
      return;
    }
    case MMM_WEIGHT_INT4: {
      const uint8_t* from = static_cast<const uint8_t*>(args.weight) + offset / 2;
      for (int64_t group = 0; group < count; group += MMM_INT4_GROUP) {
        const float scale = float_of(args.scales, s.scale_dtype, (offset + group) / MMM_INT4_GROUP);
        for (int64_t i = group; i < group + MMM_INT4_GROUP; i += 2) {
          const int pair = from[i / 2];
          out[i] = scale * static_cast<float>((pair & 15) - 8);
          out[i + 1] = scale * static_cast<float>((pair >> 4) - 8);
        }
      }
      return;
    }
    default: load_floats(args.weight, s.io_dtype, offset, count, out);
  }
}

// The sum of a b, in lanes, so that the loop vectorises although no sum may be reordered.
float dot(const float* __restrict a, const float* __restrict b, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int64_t l = 0; i < count; ++i, ++l) lanes[l] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

class Columns {
 public:
  explicit Columns(const mmm_linear_args& args) : args_(args), s_(args.shape), silu_(s_.epilogue == MMM_EPILOGUE_SILU) {}

  // Columns [first, last), at most kLinearColumns, of tokens [token, token + count), at most kTokens.
  void compute(int64_t first, int64_t last, int64_t token, int64_t count) {
    const int64_t K = s_.inputs, width = linear_columns(s_);
    for (int64_t m = 0; m < count; ++m) scale_[m] = s_.normalise ? norm_scale(token + m) : 1.0f;
    std::fill(&sums_[0][0][0], &sums_[0][0][0] + sizeof sums_ / sizeof(float), 0.0f);
    for (int64_t k = 0; k < K; k += kBlock) {
      const int64_t inputs = std::min(kBlock, K - k);
      for (int64_t m = 0; m < count; ++m) load_x(token + m, k, inputs, scale_[m], x_[m]);
      for (int64_t part = 0; part < (silu_ ? 2 : 1); ++part) {
        for (int64_t n = first; n < last; ++n) {
          load_weights(args_, part * width + n, k, inputs, weights_);
          for (int64_t m = 0; m < count; ++m) sums_[part][n - first][m] += dot(weights_, x_[m], inputs);
        }
      }
    }
    for (int64_t n = first; n < last; ++n) {
      for (int64_t m = 0; m < count; ++m) {
        float value = scaled(sums_[0][n - first][m], n);
        if (silu_) value = silu(value) * scaled(sums_[1][n - first][m], width + n);
        const int64_t index = (token + m) * width + n;
        if (s_.epilogue == MMM_EPILOGUE_RESIDUAL) value += float_of(args_.residual, s_.io_dtype, index);
        store_float(value, args_.out, s_.out_dtype, index);
      }
    }
  }

 private:
  float scaled(float sum, int64_t row) const {
    return s_.weight_format == MMM_WEIGHT_INT8 && row < s_.outputs - s_.kept ? sum * static_cast<const float*>(args_.scales)[row] : sum;
  }

  float norm_scale(int64_t token) {
    float sum = 0;
    for (int64_t k = 0; k < s_.inputs; k += kBlock) {
      const int64_t inputs = std::min<int64_t>(kBlock, s_.inputs - k);
      load_floats(args_.x, s_.io_dtype, token * args_.x_stride + k, inputs, weights_);
      sum += dot(weights_, weights_, inputs);
    }
    return 1.0f / std::sqrt(sum / static_cast<float>(s_.inputs) + s_.eps);
  }

  void load_x(int64_t token, int64_t first, int64_t count, float scale, float* out) {
    load_floats(args_.x, s_.io_dtype, token * args_.x_stride + first, count, out);
    if (!s_.normalise) return;
    load_floats(args_.norm_weight, s_.io_dtype, first, count, weights_);
    for (int64_t i = 0; i < count; ++i) out[i] = rounded(rounded(out[i] * scale, s_.io_dtype) * weights_[i], s_.io_dtype);
  }

  const mmm_linear_args& args_;
  const mmm_linear_shape& s_;
  bool silu_;
  float scale_[kTokens];
  float x_[kTokens][kBlock];
  float weights_[kBlock];
  float sums_[2][kLinearColumns][kTokens];
};

void compute_columns(const mmm_linear_args& args, int64_t first, int64_t last) {
  Columns columns(args);
  for (int64_t token = 0; token < args.shape.tokens; token += kTokens) {
    const int64_t count = std::min<int64_t>(kTokens, args.shape.tokens - token);
    for (int64_t n = first; n < last; n += kLinearColumns) {
      columns.compute(n, std::min(n + kLinearColumns, last), token, count);
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same code for processors with AVX2. Multiply-adds round once there, so the last bits differ.
[[gnu::target("avx2,fma"), gnu::flatten]] void compute_columns_avx2(const mmm_linear_args& args, int64_t first, int64_t last) {
  compute_columns(args, first, last);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
void compute_columns_avx2(const mmm_linear_args&, int64_t, int64_t) {}

bool has_avx2() { return false; }
#endif

}  // namespace

void linear_columns_cpu(const mmm_linear_args& args, int64_t first, int64_t last) {
  if (has_avx2()) {
    compute_columns_avx2(args, first, last);
  } else {
    compute_columns(args, first, last);
  }
}

int32_t linear_cpu(const mmm_linear_args& args, mmm_status&) {
  linear_columns_cpu(args, 0, linear_columns(args.shape));
  return MMM_OK;
}

}  // namespace mmm
