#include "tensorrt/plugin.h"

#include <cstdio>
#include <new>

#include "mmm/kernels.h"
#include "tensorrt/geometry.h"
#include "tensorrt/log.h"

namespace mmm::tensorrt {
namespace {

using namespace nvinfer1;

constexpr int32_t kSuccess = 0, kFailure = 1;

// What getWorkspaceSize answers when the profile makes no sense: no builder can give so much, so it fails and
// not the kernel.
constexpr size_t kImpossibleBytes = size_t{1} << 62;

}  // namespace

SelectiveScanPlugin::SelectiveScanPlugin(const char* layer, const Fields& fields) noexcept : fields_(fields) {
  std::snprintf(layer_, sizeof layer_, "%s", layer != nullptr ? layer : "");
}

IPluginCapability* SelectiveScanPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* SelectiveScanPlugin::clone() noexcept {
  return new (std::nothrow) SelectiveScanPlugin(layer_, fields_);
}

int32_t SelectiveScanPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                const DataType* inputs, int32_t input_count) const noexcept {
  if (!check_counts(layer_, input_count, output_count)) return kFailure;
  outputs[kY] = outputs[kConvStateOut] = inputs[kProjected];
  outputs[kSsmStateOut] = inputs[kSsmState];
  return kSuccess;
}

int32_t SelectiveScanPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*,
                                             int32_t, DimsExprs* outputs, int32_t output_count,
                                             IExprBuilder& builder) noexcept {
  if (!check_counts(layer_, input_count, output_count)) return kFailure;
  if (inputs[kProjected].nbDims != 3) {
    log_error(layer_, "projected has %d dimensions; wanted 3: batch, tokens, row", inputs[kProjected].nbDims);
    return kFailure;
  }
  outputs[kY] = inputs[kProjected];
  outputs[kY].d[2] = builder.constant(output_width(fields_));
  outputs[kConvStateOut] = inputs[kConvState];
  outputs[kSsmStateOut] = inputs[kSsmState];
  return kSuccess;
}

bool SelectiveScanPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                                    int32_t input_count, int32_t output_count) noexcept {
  if (!check_counts(layer_, input_count, output_count) || position < 0 || position >= kTensors) return false;
  return tensors[position].desc.format == TensorFormat::kLINEAR && type_allowed(position, tensors);
}

int32_t SelectiveScanPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                             const DynamicPluginTensorDesc*, int32_t output_count) noexcept {
  mmm_scan_shape shape;
  if (!check_counts(layer_, input_count, output_count)) return kFailure;
  return read_shape(layer_, fields_, largest_of(inputs), /*bounds=*/true, shape) ? kSuccess : kFailure;
}

size_t SelectiveScanPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                             const DynamicPluginTensorDesc*,
                                             int32_t output_count) const noexcept {
  mmm_scan_shape shape;
  uint64_t bytes = 0;
  const bool known = check_counts(layer_, input_count, output_count) &&
                     read_shape(layer_, fields_, largest_of(inputs), /*bounds=*/true, shape) &&
                     mmm_selective_scan_workspace(&shape, &bytes, nullptr) == MMM_OK;
  return known ? bytes : kImpossibleBytes;
}

IPluginV3* SelectiveScanPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

const PluginFieldCollection* SelectiveScanPlugin::getFieldsToSerialize() noexcept {
  return serialized_.of(fields_);
}

int32_t SelectiveScanPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                           const PluginTensorDesc* outputs, int32_t output_count) noexcept {
  mmm_scan_shape shape;
  if (!check_counts(layer_, input_count, output_count)) return kFailure;
  return read_shape(layer_, fields_, tensors_of(inputs, outputs), /*bounds=*/false, shape) ? kSuccess
                                                                                           : kFailure;
}

int32_t SelectiveScanPlugin::enqueue(const PluginTensorDesc* input_descs,
                                     const PluginTensorDesc* output_descs, const void* const* inputs,
                                     void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  mmm_scan_args args{};
  mmm_status status;
  if (!read_shape(layer_, fields_, tensors_of(input_descs, output_descs), /*bounds=*/false, args.shape))
    return kFailure;
  args.projected = inputs[kProjected];
  args.projected_token_stride = input_descs[kProjected].dims.d[2];
  args.projected_batch_stride = args.projected_token_stride * args.shape.tokens;
  args.lengths = static_cast<const int32_t*>(inputs[kLengths]);
  args.conv_state = inputs[kConvState];
  args.ssm_state = inputs[kSsmState];
  args.conv_weight = static_cast<const float*>(inputs[kConvWeight]);
  args.conv_bias = static_cast<const float*>(inputs[kConvBias]);
  args.dt_bias = static_cast<const float*>(inputs[kDtBias]);
  args.A_log = static_cast<const float*>(inputs[kALog]);
  args.norm_weight = static_cast<const float*>(inputs[kNormWeight]);
  args.y = outputs[kY];
  args.conv_state_out = outputs[kConvStateOut];
  args.ssm_state_out = outputs[kSsmStateOut];
  args.workspace = workspace;
  args.stream = stream;
  // TensorRT does not say how much it gave. It gave what getWorkspaceSize asked for the largest call of the
  // profile, and that is enough: the workspace never grows when a call shrinks.
  if (mmm_selective_scan_workspace(&args.shape, &args.workspace_bytes, &status) != MMM_OK ||
      mmm_selective_scan(&args, &status) != MMM_OK) {
    log_error(layer_, "%s", status.text);
    return kFailure;
  }
  return kSuccess;
}

}  // namespace mmm::tensorrt
