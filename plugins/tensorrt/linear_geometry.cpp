#include "tensorrt/linear_geometry.h"

#include <cinttypes>
#include <climits>

#include "tensorrt/log.h"

namespace mmm::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr const char* kInputNames[] = {"x", "weight", "scales", "norm_weight", "residual"};

#if MMM_WITH_CUDA
constexpr int32_t kLinearDevice = MMM_CUDA;
#else
constexpr int32_t kLinearDevice = MMM_CPU;
#endif

// -1 for a type that the kernels do not take.
int32_t linear_dtype(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return MMM_FLOAT32;
    case DataType::kHALF: return MMM_FLOAT16;
    case DataType::kBF16: return MMM_BFLOAT16;
    default: return -1;
  }
}

bool check_choice(const char* layer, const char* name, int32_t value, int32_t last) {
  if (value >= 0 && value <= last) return true;
  log_operator_error(kLinearName, layer, "%s is %d; wanted 0 to %d", name, value, last);
  return false;
}

bool refuse_size(const char* layer, const char* name, int32_t axis, int64_t found, int64_t wanted) {
  if (found == wanted) return true;
  log_operator_error(kLinearName, layer, "axis %d of %s is %" PRId64 "; wanted %" PRId64 " from x, weight and the fields", axis,
                     name, found, wanted);
  return false;
}

bool check_rank(const char* layer, const char* name, const Dims& dims, int32_t wanted) {
  if (dims.nbDims == wanted) return true;
  log_operator_error(kLinearName, layer, "%s has %d dimensions; wanted %d", name, dims.nbDims, wanted);
  return false;
}

// `dims` has the leading dimensions of x, and then `last`.
bool check_like_x(const char* layer, const char* name, const Dims& dims, const Dims& x, int64_t last) {
  if (!check_rank(layer, name, dims, x.nbDims)) return false;
  for (int32_t i = 0; i < x.nbDims; ++i) {
    if (!refuse_size(layer, name, i, dims.d[i], i + 1 < x.nbDims ? x.d[i] : last)) return false;
  }
  return true;
}

}  // namespace

int32_t linear_inputs(const LinearFields& fields, LinearInput (&inputs)[kLinearMostInputs]) noexcept {
  int32_t count = 0;
  inputs[count++] = LinearInput::kX;
  inputs[count++] = LinearInput::kWeight;
  if (fields.weight_format != MMM_WEIGHT_PLAIN) inputs[count++] = LinearInput::kScales;
  if (fields.normalise != 0) inputs[count++] = LinearInput::kNormWeight;
  if (fields.epilogue == MMM_EPILOGUE_RESIDUAL) inputs[count++] = LinearInput::kResidual;
  return count;
}

bool check_fields(const char* layer, const LinearFields& fields) noexcept {
  if (!check_choice(layer, "weight_format", fields.weight_format, MMM_WEIGHT_INT4) ||
      !check_choice(layer, "normalise", fields.normalise, 1) ||
      !check_choice(layer, "epilogue", fields.epilogue, MMM_EPILOGUE_SILU) ||
      !check_choice(layer, "float32_output", fields.float32_output, 1))
    return false;
  if (fields.normalise == 0 || (fields.eps > 0 && fields.eps < 1e30f)) return true;
  log_operator_error(kLinearName, layer, "eps is %g; wanted a finite number above 0", static_cast<double>(fields.eps));
  return false;
}

bool read_shape(const char* layer, const LinearFields& fields, const LinearTensors& tensors, bool bounds,
                mmm_linear_shape& shape) noexcept {
  LinearInput inputs[kLinearMostInputs];
  const int32_t count = linear_inputs(fields, inputs);
  const Dims &x = tensors.dims[0], &weight = tensors.dims[1];
  if (x.nbDims < 1 || !check_rank(layer, "weight", weight, 2)) return false;
  const int64_t K = weight.d[1] * (fields.weight_format == MMM_WEIGHT_INT4 ? 2 : 1), N = weight.d[0];
  if (!refuse_size(layer, "x", x.nbDims - 1, x.d[x.nbDims - 1], K)) return false;
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) {
    if (x.d[i] < 0 || __builtin_mul_overflow(tokens, int64_t{x.d[i]}, &tokens) || tokens > INT32_MAX) {
      log_operator_error(kLinearName, layer, "axis %d of x is %" PRId64 "; wanted at most 2^31-1 rows in all", i, int64_t{x.d[i]});
      return false;
    }
  }
  if (N > INT32_MAX || K > INT32_MAX) {
    log_operator_error(kLinearName, layer, "weight of %" PRId64 " outputs and %" PRId64 " inputs; at most 2^31-1 each", N, K);
    return false;
  }
  shape = {};
  shape.abi_version = MMM_ABI_VERSION;
  shape.device = kLinearDevice;
  shape.io_dtype = linear_dtype(tensors.types[0]);
  shape.out_dtype = fields.float32_output != 0 ? MMM_FLOAT32 : shape.io_dtype;
  shape.weight_format = fields.weight_format;
  shape.epilogue = fields.epilogue;
  shape.normalise = fields.normalise;
  shape.tokens = static_cast<int32_t>(tokens);
  shape.outputs = static_cast<int32_t>(N);
  shape.inputs = static_cast<int32_t>(K);
  shape.eps = fields.eps;
  for (int32_t i = 2; i < count; ++i) {
    const char* name = kInputNames[static_cast<int32_t>(inputs[i])];
    const Dims& dims = tensors.dims[i];
    switch (inputs[i]) {
      case LinearInput::kScales: {
        shape.scale_dtype = linear_dtype(tensors.types[i]);
        const bool groups = fields.weight_format == MMM_WEIGHT_INT4;
        if (!check_rank(layer, name, dims, groups ? 2 : 1) || !refuse_size(layer, name, 0, dims.d[0], N) ||
            (groups && !refuse_size(layer, name, 1, dims.d[1], K / MMM_INT4_GROUP)))
          return false;
        break;
      }
      case LinearInput::kNormWeight:
        if (!check_rank(layer, name, dims, 1) || !refuse_size(layer, name, 0, dims.d[0], K)) return false;
        break;
      default:
        if (!bounds && !check_like_x(layer, name, dims, x, N)) return false;
    }
  }
  const int64_t columns = fields.epilogue == MMM_EPILOGUE_SILU ? N / 2 : N;
  if (!bounds && !check_like_x(layer, "out", tensors.dims[count], x, columns)) return false;
  mmm_status status;
  uint64_t bytes;
  if (mmm_linear_workspace(&shape, &bytes, &status) == MMM_OK) return true;
  log_operator_error(kLinearName, layer, "%s", status.text);
  return false;
}

bool linear_type_allowed(const LinearFields& fields, int32_t position, DataType type, DataType x_type) noexcept {
  LinearInput inputs[kLinearMostInputs];
  const int32_t count = linear_inputs(fields, inputs);
  if (position == count) return type == (fields.float32_output != 0 ? DataType::kFLOAT : x_type);
  const bool half = type == DataType::kHALF || type == DataType::kBF16;
  switch (inputs[position]) {
    case LinearInput::kX: return half || (type == DataType::kFLOAT && kLinearDevice == MMM_CPU);
    case LinearInput::kWeight: return type == (fields.weight_format == MMM_WEIGHT_PLAIN ? x_type : DataType::kINT8);
    case LinearInput::kScales: return fields.weight_format == MMM_WEIGHT_INT8 ? type == DataType::kFLOAT : half;
    default: return type == x_type;
  }
}

}  // namespace mmm::tensorrt
