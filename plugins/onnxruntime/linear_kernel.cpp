#include "onnxruntime/linear_kernel.h"

#include <limits>
#include <string>

#include "abi/backend.h"
#include "onnxruntime/attributes.h"
#include "onnxruntime/execution.h"

namespace mmm::ort {
namespace {

constexpr size_t kAbsent = SIZE_MAX;
constexpr const char* kRoleNames[] = {"x", "weight", "scales", "norm_weight", "residual", "kept_weight"};

int32_t dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return MMM_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return MMM_BFLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return MMM_FLOAT32;
    default: return -1;
  }
}

const char* type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    default: return "of another type";
  }
}

Shape with_last(const Shape& x, int64_t last) {
  Shape shape = x;
  shape.data()[x.rank() - 1] = last;
  return shape;
}

}  // namespace

LinearKernel::LinearKernel(const OrtApi& api, const OrtKernelInfo* info, mmm_dtype io_dtype, mmm_device device)
    : api_(api) {
  const Attributes attributes(api, info, kLinearName);
  attributes.check_version(kLinearPluginVersion);
  shape_.abi_version = MMM_ABI_VERSION;
  shape_.device = device;
  shape_.io_dtype = io_dtype;
  shape_.weight_format = attributes.choice("weight_format", MMM_WEIGHT_INT4);
  shape_.epilogue = attributes.choice("epilogue", MMM_EPILOGUE_SILU);
  shape_.normalise = attributes.choice("normalise", 1);
  shape_.out_dtype = attributes.choice("float32_output", 1) ? MMM_FLOAT32 : io_dtype;
  shape_.eps = attributes.number("eps");

  const bool has[kRoles] = {true, true, shape_.weight_format != MMM_WEIGHT_PLAIN, shape_.normalise != 0,
                            shape_.epilogue == MMM_EPILOGUE_RESIDUAL, attributes.flag("keeps_rows") != 0};
  for (size_t i = 0; i < kRoles; ++i) position_[i] = has[i] ? inputs_++ : kAbsent;
  size_t given = 0;
  ort::check(api.KernelInfo_GetInputCount(info, &given));
  if (given != inputs_) {
    fail(api, ORT_INVALID_ARGUMENT,
         "the node has " + std::to_string(given) + " inputs; its attributes call for " + std::to_string(inputs_),
         kLinearName);
  }
  Operand constants[kRoles];
  for (const Role role : {kWeight, kScales, kNormWeight, kKept}) {
    if (position_[role] == kAbsent) continue;
    int is_constant = 0;
    const OrtValue* value = nullptr;
    ort::check(api.KernelInfoGetConstantInput_tensor(info, position_[role], &is_constant, &value));
    if (is_constant != 0) constants[role] = operand_of(value);
    weights_are_constant_ = weights_are_constant_ && is_constant != 0;
  }
  if (weights_are_constant_) {  // refused sizes are told when the graph is loaded, not when it first runs
    mmm_linear_shape call = shape_;
    check_weights(constants, call);
  }
}

void LinearKernel::compute(OrtKernelContext* context) const {
  Operand operands[kRoles];
  for (size_t i = 0; i < kRoles; ++i) {
    if (position_[i] == kAbsent) continue;
    const OrtValue* value = nullptr;
    ort::check(api_.KernelContext_GetInput(context, position_[i], &value));
    if (value == nullptr)
      fail(api_, ORT_INVALID_ARGUMENT, std::string("input ") + kRoleNames[i] + " is missing", kLinearName);
    operands[i] = operand_of(value);
  }
  mmm_linear_args args{};
  args.shape = shape_;
  const Shape& x = operands[kX].shape;
  if (x.rank() < 1) fail(api_, ORT_INVALID_ARGUMENT, "x is a scalar; wanted (..., inputs)", kLinearName);
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < x.rank(); ++i) tokens *= x[i];
  args.shape.tokens = size_of(api_, "the number of tokens", tokens, kLinearName);
  check_weights(operands, args.shape);
  if (x[x.rank() - 1] != args.shape.inputs) {
    fail(api_, ORT_INVALID_ARGUMENT,
         "x has shape " + x.text() + "; wanted (..., " + std::to_string(args.shape.inputs) + "), as the weight says",
         kLinearName);
  }
  if (operands[kResidual].value != nullptr)
    check(kResidual, operands[kResidual], with_last(x, args.shape.outputs), io_type());

  const Shape out_shape = with_last(x, linear_columns(args.shape));
  OrtValue* out = nullptr;
  ort::check(api_.KernelContext_GetOutput(context, 0, out_shape.data(), out_shape.rank(), &out));
  ort::check(api_.GetTensorMutableData(out, &args.out));
  args.x = operands[kX].data;
  args.x_stride = args.shape.inputs;
  args.weight = operands[kWeight].data;
  args.scales = operands[kScales].data;
  args.norm_weight = operands[kNormWeight].data;
  args.residual = operands[kResidual].data;
  args.kept_weight = operands[kKept].data;
  args.overlap = weights_are_constant_;  // no kernel writes a constant
  run_linear(api_, context, operands[kWeight].value, args);
}

LinearKernel::Operand LinearKernel::operand_of(const OrtValue* value) const {
  Operand operand;
  operand.value = value;
  // The only way to the data in this version of the interface; nothing is written through it.
  ort::check(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &operand.data));
  const TensorInfo info = TensorInfo::of(api_, value);
  operand.shape = info.shape();
  ort::check(api_.GetTensorElementType(info.get(), &operand.type));
  return operand;
}

void LinearKernel::check_weights(const Operand (&operands)[kRoles], mmm_linear_shape& call) const {
  const Shape& weight = operands[kWeight].shape;
  if (weight.rank() != 2)
    fail(api_, ORT_INVALID_ARGUMENT, "weight has shape " + weight.text() + "; wanted (outputs, inputs)", kLinearName);
  const int64_t packed = call.weight_format == MMM_WEIGHT_INT4 ? 2 : 1;
  call.outputs = size_of(api_, "outputs", weight[0], kLinearName);
  call.inputs = size_of(api_, "inputs", weight[1] * packed, kLinearName);
  if (operands[kKept].value != nullptr) {
    const Shape& kept = operands[kKept].shape;
    call.kept = kept.rank() == 2 ? size_of(api_, "rows kept", kept[0], kLinearName) : 0;
    call.outputs = size_of(api_, "outputs", int64_t{call.outputs} + call.kept, kLinearName);
    check(kKept, operands[kKept], {call.kept, call.inputs}, io_type());
  }
  const bool integers = call.weight_format != MMM_WEIGHT_PLAIN;
  check(kWeight, operands[kWeight], weight, integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : io_type());
  if (integers) {
    const Operand& scales = operands[kScales];
    call.scale_dtype = dtype_of(scales.type);
    if (call.weight_format == MMM_WEIGHT_INT8)
      check(kScales, scales, {weight[0]}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    else
      check(kScales, scales, {weight[0], call.inputs / MMM_INT4_GROUP}, scales.type);
  }
  if (operands[kNormWeight].value != nullptr) check(kNormWeight, operands[kNormWeight], {call.inputs}, io_type());
  mmm_status status{};
  uint64_t bytes = 0;
  check_status(api_, mmm_linear_workspace(&call, &bytes, &status), status, kLinearName);
}

void LinearKernel::check(Role role, const Operand& operand, const Shape& wanted, ONNXTensorElementDataType type) const {
  if (operand.shape != wanted) {
    fail(api_, ORT_INVALID_ARGUMENT,
         std::string(kRoleNames[role]) + " has shape " + operand.shape.text() + "; wanted " + wanted.text() +
             ", as x, the weight and the attributes say",
         kLinearName);
  }
  if (operand.type != type) {
    fail(api_, ORT_INVALID_ARGUMENT,
         std::string(kRoleNames[role]) + " is " + type_name(operand.type) + "; wanted " + type_name(type), kLinearName);
  }
}

ONNXTensorElementDataType LinearKernel::io_type() const {
  switch (shape_.io_dtype) {
    case MMM_FLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case MMM_BFLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

}  // namespace mmm::ort
