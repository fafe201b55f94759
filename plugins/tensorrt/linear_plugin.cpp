#include "tensorrt/linear_plugin.h"

#include <cstdio>
#include <new>

#include "tensorrt/linear_geometry.h"
#include "tensorrt/log.h"

namespace mmm::tensorrt {
namespace {

using namespace nvinfer1;

constexpr int32_t kSuccess = 0, kFailure = 1;
constexpr size_t kImpossibleBytes = size_t{1} << 62;  // see plugin.cpp

LinearTensors tensors_of(const PluginTensorDesc* inputs, int32_t count, const PluginTensorDesc* outputs) {
  LinearTensors tensors{};
  for (int32_t i = 0; i <= count; ++i) {
    const PluginTensorDesc& desc = i < count ? inputs[i] : outputs[0];
    tensors.dims[i] = desc.dims;
    tensors.types[i] = desc.type;
  }
  return tensors;
}

LinearTensors largest_of(const DynamicPluginTensorDesc* inputs, int32_t count) {
  LinearTensors tensors{};
  for (int32_t i = 0; i < count; ++i) {
    tensors.dims[i] = inputs[i].max;
    tensors.types[i] = inputs[i].desc.type;
  }
  return tensors;
}

}  // namespace

LinearPlugin::LinearPlugin(const char* layer, const LinearFields& fields) noexcept : fields_(fields) {
  std::snprintf(layer_, sizeof layer_, "%s", layer != nullptr ? layer : "");
}

IPluginCapability* LinearPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* LinearPlugin::clone() noexcept { return new (std::nothrow) LinearPlugin(layer_, fields_); }

bool LinearPlugin::check_counts(int32_t inputs, int32_t outputs) const noexcept {
  LinearInput all[kLinearMostInputs];
  const int32_t wanted = linear_inputs(fields_, all);
  if (inputs == wanted && outputs == 1) return true;
  log_operator_error(kLinearName, layer_, "%d inputs and %d outputs; the fields call for %d and 1", inputs, outputs, wanted);
  return false;
}

int32_t LinearPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                         int32_t input_count) const noexcept {
  if (!check_counts(input_count, output_count)) return kFailure;
  outputs[0] = fields_.float32_output != 0 ? DataType::kFLOAT : inputs[0];
  return kSuccess;
}

int32_t LinearPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                      DimsExprs* outputs, int32_t output_count, IExprBuilder& builder) noexcept {
  if (!check_counts(input_count, output_count)) return kFailure;
  if (inputs[0].nbDims < 1 || inputs[1].nbDims != 2) {
    log_operator_error(kLinearName, layer_, "x has %d dimensions and weight %d; wanted 1 or more, and 2", inputs[0].nbDims,
                       inputs[1].nbDims);
    return kFailure;
  }
  const IDimensionExpr* columns = inputs[1].d[0];
  if (fields_.epilogue == MMM_EPILOGUE_SILU)
    columns = builder.operation(DimensionOperation::kFLOOR_DIV, *columns, *builder.constant(2));
  outputs[0] = inputs[0];
  outputs[0].d[inputs[0].nbDims - 1] = columns;
  return kSuccess;
}

bool LinearPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                             int32_t input_count, int32_t output_count) noexcept {
  if (!check_counts(input_count, output_count) || position < 0 || position > input_count) return false;
  const PluginTensorDesc& desc = tensors[position].desc;
  return desc.format == TensorFormat::kLINEAR && linear_type_allowed(fields_, position, desc.type, tensors[0].desc.type);
}

int32_t LinearPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                      const DynamicPluginTensorDesc*, int32_t output_count) noexcept {
  mmm_linear_shape shape;
  if (!check_counts(input_count, output_count)) return kFailure;
  return read_shape(layer_, fields_, largest_of(inputs, input_count), /*bounds=*/true, shape) ? kSuccess : kFailure;
}

size_t LinearPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                      const DynamicPluginTensorDesc*, int32_t output_count) const noexcept {
  mmm_linear_shape shape;
  uint64_t bytes = 0;
  const bool known = check_counts(input_count, output_count) &&
                     read_shape(layer_, fields_, largest_of(inputs, input_count), /*bounds=*/true, shape) &&
                     mmm_linear_workspace(&shape, &bytes, nullptr) == MMM_OK;
  return known ? bytes : kImpossibleBytes;
}

IPluginV3* LinearPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

const PluginFieldCollection* LinearPlugin::getFieldsToSerialize() noexcept {
  write_table(kLinearTable, &fields_, rows_);
  collection_.nbFields = kLinearFieldCount;
  collection_.fields = rows_;
  return &collection_;
}

int32_t LinearPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                    const PluginTensorDesc* outputs, int32_t output_count) noexcept {
  mmm_linear_shape shape;
  if (!check_counts(input_count, output_count)) return kFailure;
  const LinearTensors tensors = tensors_of(inputs, input_count, outputs);
  return read_shape(layer_, fields_, tensors, /*bounds=*/false, shape) ? kSuccess : kFailure;
}

int32_t LinearPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                              const void* const* inputs, void* const* outputs, void* workspace,
                              cudaStream_t stream) noexcept {
  LinearInput order[kLinearMostInputs];
  const int32_t count = linear_inputs(fields_, order);
  mmm_linear_args args{};
  mmm_status status;
  if (!read_shape(layer_, fields_, tensors_of(input_descs, count, output_descs), /*bounds=*/false, args.shape))
    return kFailure;
  for (int32_t i = 0; i < count; ++i) {
    switch (order[i]) {
      case LinearInput::kX: args.x = inputs[i]; break;
      case LinearInput::kWeight: args.weight = inputs[i]; break;
      case LinearInput::kScales: args.scales = inputs[i]; break;
      case LinearInput::kNormWeight: args.norm_weight = inputs[i]; break;
      case LinearInput::kResidual: args.residual = inputs[i]; break;
    }
  }
  args.x_stride = args.shape.inputs;
  args.out = outputs[0];
  args.workspace = workspace;
  args.stream = stream;
  // TensorRT does not say how much it gave, but it is enough, as for the scan; nor whether the weights are constants, so that no overlap
  // with the kernel before is asked for.
  if (mmm_linear_workspace(&args.shape, &args.workspace_bytes, &status) != MMM_OK ||
      mmm_linear(&args, &status) != MMM_OK) {
    log_operator_error(kLinearName, layer_, "%s", status.text);
    return kFailure;
  }
  return kSuccess;
}

LinearCreator::LinearCreator() noexcept {
  for (int32_t i = 0; i < kLinearFieldCount; ++i) rows_[i] = {kLinearRows[i].name, nullptr, kLinearRows[i].type, 1};
  names_.nbFields = kLinearFieldCount;
  names_.fields = rows_;
}

IPluginV3* LinearCreator::createPlugin(const AsciiChar* name, const PluginFieldCollection* collection,
                                       TensorRTPhase) noexcept {
  LinearFields fields;
  if (!read_table(kLinearTable, name, collection, &fields) || !check_fields(name, fields)) return nullptr;
  return new (std::nothrow) LinearPlugin(name, fields);
}

}  // namespace mmm::tensorrt
