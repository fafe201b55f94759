#include "onnxruntime/kernel.h"

#include <string>

#include "onnxruntime/attributes.h"
#include "onnxruntime/execution.h"

namespace mmm::ort {
namespace {

constexpr int32_t kAnyConvWidth = 2;  // to check the other sizes with

}  // namespace

Kernel::Kernel(const OrtApi& api, const OrtKernelInfo* info, mmm_dtype io_dtype, mmm_device device)
    : api_(api) {
  const Attributes attributes(api, info, kScanName);
  attributes.check_version(kPluginVersion);
  shape_.abi_version = MMM_ABI_VERSION;
  shape_.device = device;
  shape_.io_dtype = io_dtype;
  shape_.state_dtype = MMM_FLOAT32;
  shape_.batch = 1;
  shape_.tokens = 1;
  shape_.heads = attributes.integer("heads");
  shape_.kv_heads = attributes.integer("kv_heads");
  shape_.head_dim = attributes.integer("head_dim");
  shape_.state_dim = attributes.integer("state_dim");
  shape_.conv_width = kAnyConvWidth;
  shape_.eps = attributes.number("eps");
  shape_.method = MMM_AUTO;
  overlap_ = attributes.flag("overlap");

  const OrtValue* constants[kInputs] = {};
  for (size_t i = kConvWeight; i < kInputs; ++i) {
    int is_constant = 0;
    check(api.KernelInfoGetConstantInput_tensor(info, i, &is_constant, &constants[i]));
    if (is_constant == 0) constants[i] = nullptr;
  }
  if (constants[kConvWeight] != nullptr) {
    const Shape dims = TensorInfo::of(api, constants[kConvWeight]).shape();
    if (dims.rank() == 2) {
      shape_.conv_width = size_of(api, "the width of conv_weight", dims[1]);
      conv_width_is_known_ = true;
    }
  }
  // Refused sizes are told when the graph is loaded, not when it first runs.
  mmm_status status{};
  uint64_t bytes = 0;
  check_status(api, mmm_selective_scan_workspace(&shape_, &bytes, &status), status);
  for (size_t i = kConvWeight; i < kInputs; ++i) {
    if (constants[i] == nullptr) continue;
    check_shape(static_cast<Input>(i), constants[i], shape_);
    is_checked_[i] = true;
  }
}

void Kernel::compute(OrtKernelContext* context) const {
  const OrtValue* inputs[kInputs] = {};
  void* data[kInputs] = {};
  for (size_t i = 0; i < kInputs; ++i) {
    check(api_.KernelContext_GetInput(context, i, &inputs[i]));
    if (inputs[i] == nullptr)
      fail(api_, ORT_INVALID_ARGUMENT, std::string("input ") + kInputNames[i] + " is missing");
    // The only way to the data in this version of the interface; nothing is written through these.
    check(api_.GetTensorMutableData(const_cast<OrtValue*>(inputs[i]), &data[i]));
  }
  int64_t conv_width = shape_.conv_width;
  if (!conv_width_is_known_) {
    const Shape dims = TensorInfo::of(api_, inputs[kConvWeight]).shape();
    if (dims.rank() != 2)
      fail(api_, ORT_INVALID_ARGUMENT, "conv_weight has shape " + dims.text() + "; wanted (channels, width)");
    conv_width = dims[1];
  }
  mmm_scan_args args{};
  args.overlap = overlap_;
  args.shape = shape_of_call(TensorInfo::of(api_, inputs[kProjected]).shape(), conv_width);
  for (size_t i = kLengths; i < kInputs; ++i) {
    if (!is_checked_[i]) check_shape(static_cast<Input>(i), inputs[i], args.shape);
  }

  const mmm_scan_shape& call = args.shape;
  const Shape output_shapes[kOutputs] = {
      {call.batch, call.tokens, int64_t{call.heads} * call.head_dim},
      wanted_shape(kConvState, call),
      wanted_shape(kSsmState, call),
  };
  void* results[kOutputs] = {};
  for (size_t i = 0; i < kOutputs; ++i) {
    OrtValue* output = nullptr;
    check(
        api_.KernelContext_GetOutput(context, i, output_shapes[i].data(), output_shapes[i].rank(), &output));
    check(api_.GetTensorMutableData(output, &results[i]));
  }
  const int64_t width = wanted_shape(kProjected, call)[2];
  args.projected = data[kProjected];
  args.projected_batch_stride = call.tokens * width;
  args.projected_token_stride = width;
  args.lengths = static_cast<const int32_t*>(data[kLengths]);
  args.conv_state = data[kConvState];
  args.ssm_state = data[kSsmState];
  args.conv_weight = static_cast<const float*>(data[kConvWeight]);
  args.conv_bias = static_cast<const float*>(data[kConvBias]);
  args.dt_bias = static_cast<const float*>(data[kDtBias]);
  args.A_log = static_cast<const float*>(data[kALog]);
  args.norm_weight = static_cast<const float*>(data[kNormWeight]);
  args.y = results[kY];
  args.conv_state_out = results[kConvStateOut];
  args.ssm_state_out = results[kSsmStateOut];
  // A weight: ONNX Runtime placed it itself, while a bound input lies where its binder said.
  run_scan(api_, context, inputs[kNormWeight], args);
}

mmm_scan_shape Kernel::shape_of_call(const Shape& projected, int64_t conv_width) const {
  mmm_scan_shape call = shape_;
  call.conv_width = size_of(api_, "the width of conv_weight", conv_width);
  if (projected.rank() == 3) {
    call.batch = size_of(api_, "the batch", projected[0]);
    call.tokens = size_of(api_, "the number of tokens", projected[1]);
  }
  const Shape wanted = wanted_shape(kProjected, call);
  if (projected != wanted) {
    fail(api_, ORT_INVALID_ARGUMENT,
         "projected has shape " + projected.text() + "; wanted (batch, tokens, " + std::to_string(wanted[2]) +
             "), as the attributes say");
  }
  return call;
}

Shape Kernel::wanted_shape(Input input, const mmm_scan_shape& call) const {
  const int64_t B = call.batch, T = call.tokens, H = call.heads, G = call.kv_heads;
  const int64_t P = call.head_dim, N = call.state_dim, K = call.conv_width;
  const int64_t C = G * P + G * N + H * N;
  switch (input) {
    case kProjected: return {B, T, C + H * P + H};
    case kLengths: return {B};
    case kConvState: return {B, C, K - 1};
    case kSsmState: return {B, H, P, N};
    case kConvWeight: return {C, K};
    case kConvBias: return {C};
    case kDtBias: return {H};
    case kALog: return {H};
    default: return {P};
  }
}

void Kernel::check_shape(Input input, const OrtValue* value, const mmm_scan_shape& call) const {
  const Shape found = TensorInfo::of(api_, value).shape();
  const Shape wanted = wanted_shape(input, call);
  if (found != wanted) {
    fail(api_, ORT_INVALID_ARGUMENT,
         std::string(kInputNames[input]) + " has shape " + found.text() + "; wanted " + wanted.text() +
             ", as projected and the attributes say");
  }
}

}  // namespace mmm::ort
