#include "tensorrt/geometry.h"

#include <cinttypes>
#include <climits>
#include <cstdio>

#include "tensorrt/log.h"

namespace mmm::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int64_t kAny = -1;

#if MMM_WITH_CUDA
constexpr int32_t kDevice = MMM_CUDA;
#else
constexpr int32_t kDevice = MMM_CPU;
#endif

// -1 for a type that the kernels do not take.
int32_t dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return MMM_FLOAT32;
    case DataType::kHALF: return MMM_FLOAT16;
    case DataType::kBF16: return MMM_BFLOAT16;
    default: return -1;
  }
}

mmm_scan_shape shape_of(const Fields& fields) {
  mmm_scan_shape shape{};
  shape.abi_version = MMM_ABI_VERSION;
  shape.device = kDevice;
  shape.batch = shape.tokens = 1;
  shape.heads = fields.heads;
  shape.kv_heads = fields.kv_heads;
  shape.head_dim = fields.head_dim;
  shape.state_dim = fields.state_dim;
  shape.conv_width = 2;
  shape.eps = fields.eps;
  shape.method = MMM_AUTO;
  return shape;
}

bool check_shape(const char* layer, const mmm_scan_shape& shape) {
  mmm_status status;
  uint64_t bytes;
  if (mmm_selective_scan_workspace(&shape, &bytes, &status) == MMM_OK) return true;
  log_error(layer, "%s", status.text);
  return false;
}

// "(2, 5, any)" into `text`.
const char* describe(const Dims& dims, char (&text)[128]) {
  size_t used = std::snprintf(text, sizeof text, "(");
  for (int32_t i = 0; i < dims.nbDims && used < sizeof text - 24; ++i) {
    const char* comma = i > 0 ? ", " : "";
    used += dims.d[i] == kAny
                ? std::snprintf(text + used, sizeof text - used, "%sany", comma)
                : std::snprintf(text + used, sizeof text - used, "%s%" PRId64, comma, int64_t{dims.d[i]});
  }
  std::snprintf(text + used, sizeof text - used, ")");
  return text;
}

bool check_dims(const char* layer, int32_t position, const Dims& found, const Dims& wanted) {
  bool equal = found.nbDims == wanted.nbDims;
  for (int32_t i = 0; equal && i < wanted.nbDims; ++i) {
    equal = wanted.d[i] == kAny ? found.d[i] >= 0 : found.d[i] == wanted.d[i];
  }
  if (equal) return true;
  char found_text[128], wanted_text[128];
  log_error(layer, "%s is %s; wanted %s from heads, kv_heads, head_dim, state_dim and the other inputs",
            kTensorNames[position], describe(found, found_text), describe(wanted, wanted_text));
  return false;
}

// Checks the first `count` tensors.
bool check_all_dims(const char* layer, const Fields& fields, const Tensors& tensors, int32_t count, int64_t B,
                    int64_t T, int64_t K) {
  // Checked fields: head_dim and state_dim are at most 128, so nothing here overflows.
  const int64_t H = fields.heads, G = fields.kv_heads, P = fields.head_dim, N = fields.state_dim;
  const int64_t C = G * P + G * N + H * N, W = C + H * P + H;
  const Dims wanted[kTensors] = {{3, {B, T, W}}, {1, {B}},           {3, {B, C, K - 1}}, {4, {B, H, P, N}},
                                 {2, {C, K}},    {1, {C}},           {1, {H}},           {1, {H}},
                                 {1, {P}},       {3, {B, T, H * P}}, {3, {B, C, K - 1}}, {4, {B, H, P, N}}};
  for (int32_t i = 0; i < count; ++i) {
    if (!check_dims(layer, i, tensors.dims[i], wanted[i])) return false;
  }
  return true;
}

}  // namespace

Tensors tensors_of(const nvinfer1::PluginTensorDesc* inputs,
                   const nvinfer1::PluginTensorDesc* outputs) noexcept {
  Tensors tensors;
  for (int32_t i = 0; i < kTensors; ++i) {
    const nvinfer1::PluginTensorDesc& desc = i < kInputs ? inputs[i] : outputs[i - kInputs];
    tensors.dims[i] = desc.dims;
    tensors.types[i] = desc.type;
  }
  return tensors;
}

Tensors largest_of(const nvinfer1::DynamicPluginTensorDesc* inputs) noexcept {
  Tensors tensors{};
  for (int32_t i = 0; i < kInputs; ++i) {
    tensors.dims[i] = inputs[i].max;
    tensors.types[i] = inputs[i].desc.type;
  }
  return tensors;
}

bool check_fields(const char* layer, const Fields& fields) noexcept {
  return check_shape(layer, shape_of(fields));
}

bool read_shape(const char* layer, const Fields& fields, const Tensors& tensors, bool bounds,
                mmm_scan_shape& shape) noexcept {
  const Dims& projected = tensors.dims[kProjected];
  const Dims& conv_weight = tensors.dims[kConvWeight];
  const int64_t B = projected.nbDims > 0 ? projected.d[0] : 0, T = projected.nbDims > 1 ? projected.d[1] : 0;
  const int64_t K = conv_weight.nbDims > 1 ? conv_weight.d[1] : 2;
  const bool known = bounds ? check_all_dims(layer, fields, tensors, kInputs, kAny, kAny, K)
                            : check_all_dims(layer, fields, tensors, kTensors, B, T, K);
  if (!known) return false;
  if (B > INT32_MAX || T > INT32_MAX || K > INT32_MAX) {
    log_error(layer, "batch %" PRId64 ", tokens %" PRId64 ", conv width %" PRId64 "; at most 2^31-1 each", B,
              T, K);
    return false;
  }
  shape = shape_of(fields);
  shape.io_dtype = dtype_of(tensors.types[kProjected]);
  shape.state_dtype = dtype_of(tensors.types[kSsmState]);
  shape.batch = static_cast<int32_t>(B);
  shape.tokens = static_cast<int32_t>(T);
  shape.conv_width = static_cast<int32_t>(K);
  return check_shape(layer, shape);
}

bool type_allowed(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors) noexcept {
  const DataType type = tensors[position].desc.type;
  switch (position) {
    case kProjected:
    case kSsmState: return dtype_of(type) >= 0;
    case kLengths: return type == DataType::kINT32;
    case kConvState:
    case kInputs + kY:
    case kInputs + kConvStateOut: return type == tensors[kProjected].desc.type;
    case kInputs + kSsmStateOut: return type == tensors[kSsmState].desc.type;
    default: return type == DataType::kFLOAT;  // weights
  }
}

bool check_counts(const char* layer, int32_t inputs, int32_t outputs) noexcept {
  if (inputs == kInputs && outputs == kOutputs) return true;
  log_error(layer, "%d inputs and %d outputs; wanted %d and %d", inputs, outputs, int32_t{kInputs},
            int32_t{kOutputs});
  return false;
}

}  // namespace mmm::tensorrt
