#include "host/life_cycle.h"

#include <algorithm>

#include "host/expressions.h"
#include "host/failure.h"
#include "host/json_lines.h"

namespace mmm::host {
namespace {

using namespace nvinfer1;

constexpr DataType kAllTypes[] = {DataType::kFLOAT, DataType::kHALF,  DataType::kBF16,
                                  DataType::kINT8,  DataType::kINT32, DataType::kINT64,
                                  DataType::kBOOL,  DataType::kUINT8, DataType::kFP8};

}  // namespace

std::unique_ptr<IPluginV3> create(IPluginCreatorV3One& creator, const Logger& logger,
                                  const std::vector<Field>& fields, TensorRTPhase phase) {
  const FieldView view(fields);
  const char* name = phase == TensorRTPhase::kBUILD ? "createPlugin BUILD" : "createPlugin RUNTIME";
  std::unique_ptr<IPluginV3> plugin(creator.createPlugin("layer0", view.get(), phase));
  if (plugin == nullptr) throw logger.failure(std::string(name) + " gave no plugin");
  print_step(name, {{"fields", json(static_cast<int64_t>(fields.size()))}});
  return plugin;
}

namespace {

void infer_outputs(IPluginV3OneBuild& plugin, const Logger& logger, Descriptions& tensors) {
  DataType inputs[kInputs], outputs[kOutputs];
  for (int32_t i = 0; i < kInputs; ++i) inputs[i] = tensors[i].type;
  if (plugin.getNbOutputs() != kOutputs) throw Failure("the plugin has another number of outputs");
  if (plugin.getOutputDataTypes(outputs, kOutputs, inputs, kInputs) != 0)
    throw logger.failure("getOutputDataTypes failed");

  ExpressionBuilder builder;
  DimsExprs input_dims[kInputs], output_dims[kOutputs];
  for (int32_t i = 0; i < kInputs; ++i) {
    input_dims[i].nbDims = tensors[i].dims.nbDims;
    for (int32_t k = 0; k < tensors[i].dims.nbDims; ++k)
      input_dims[i].d[k] = builder.constant(tensors[i].dims.d[k]);
  }
  if (plugin.getOutputShapes(input_dims, kInputs, nullptr, 0, output_dims, kOutputs, builder) != 0) {
    throw logger.failure("getOutputShapes failed");
  }
  std::vector<std::string> texts;
  for (int32_t i = 0; i < kOutputs; ++i) {
    std::vector<int64_t> shape;
    for (int32_t k = 0; k < output_dims[i].nbDims; ++k)
      shape.push_back(output_dims[i].d[k]->getConstantValue());
    tensors[kInputs + i] = describe(outputs[i], shape);
    texts.push_back(std::string(type_name(outputs[i])) + shape_text(shape));
  }
  print_step("getOutputShapes", {{"outputs", json(texts)}});
}

// The types that `position` may have after those before it, in linear format.
std::vector<std::string> accepted_types(IPluginV3OneBuild& plugin,
                                        std::vector<DynamicPluginTensorDesc> tensors, int32_t position) {
  std::vector<std::string> names;
  for (const DataType type : kAllTypes) {
    tensors[position].desc.type = type;
    if (plugin.supportsFormatCombination(position, tensors.data(), kInputs, kOutputs))
      names.push_back(type_name(type));
  }
  return names;
}

void check_formats(IPluginV3OneBuild& plugin, const std::vector<DynamicPluginTensorDesc>& tensors) {
  for (int32_t i = 0; i < kTensors; ++i) {
    const std::vector<std::string> types = accepted_types(plugin, tensors, i);
    const bool accepted = plugin.supportsFormatCombination(i, tensors.data(), kInputs, kOutputs);
    std::vector<DynamicPluginTensorDesc> others = tensors;
    others[i].desc.format = TensorFormat::kCHW32;
    const bool linear_only = !plugin.supportsFormatCombination(i, others.data(), kInputs, kOutputs);
    print_step("supportsFormatCombination", {{"tensor", json(kTensorNames[i])},
                                             {"types", json(types)},
                                             {"linear_only", linear_only ? "true" : "false"}});
    if (accepted) continue;
    std::string wanted;
    for (const std::string& name : types) wanted += (wanted.empty() ? "" : ", ") + name;
    throw Failure(std::string("supportsFormatCombination refuses ") + kTensorNames[i],
                  type_name(tensors[i].desc.type),
                  wanted.empty() ? "no type; one of the tensors before it is wrong" : wanted);
  }
}

}  // namespace

Built build(IPluginCreatorV3One& creator, const Logger& logger, const std::vector<Field>& fields,
            const Inputs& inputs, CallSize largest) {
  Built built{};
  for (int32_t i = 0; i < kInputs; ++i) {
    built.tensors[i] = describe(data_type(inputs.arrays[i].type), inputs.arrays[i].shape);
  }
  // TensorRT works on clones, so the one that was created is not the one that is asked.
  const std::unique_ptr<IPluginV3> created = create(creator, logger, fields, TensorRTPhase::kBUILD);
  const std::unique_ptr<IPluginV3> plugin(created->clone());
  auto& asked = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
  infer_outputs(asked, logger, built.tensors);

  const Dims& projected = built.tensors[tensorrt::kProjected].dims;
  const CallSize smallest{std::min<int64_t>(1, projected.d[0]), std::min<int64_t>(1, projected.d[1])};
  std::vector<DynamicPluginTensorDesc> dynamic(kTensors);
  for (int32_t i = 0; i < kTensors; ++i) {
    dynamic[i].desc = built.tensors[i];
    dynamic[i].opt = built.tensors[i].dims;
    dynamic[i].desc.dims = resized(i, built.tensors[i].dims, {-1, -1});
    dynamic[i].min = resized(i, built.tensors[i].dims, smallest);
    dynamic[i].max = resized(i, built.tensors[i].dims, largest);
  }
  check_formats(asked, dynamic);
  if (asked.configurePlugin(dynamic.data(), kInputs, dynamic.data() + kInputs, kOutputs) != 0) {
    throw logger.failure("configurePlugin failed");
  }
  print_step("configurePlugin", {{"max_batch", json(largest.batch)}, {"max_tokens", json(largest.tokens)}});
  built.workspace_bytes = asked.getWorkspaceSize(dynamic.data(), kInputs, dynamic.data() + kInputs, kOutputs);
  print_step("getWorkspaceSize", {{"bytes", json(static_cast<int64_t>(built.workspace_bytes))}});

  const auto* serialized =
      capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME).getFieldsToSerialize();
  if (serialized == nullptr) throw logger.failure("getFieldsToSerialize gave nothing");
  built.fields = fields_from_collection(*serialized);
  std::vector<std::string> texts;
  for (const Field& field : built.fields) texts.push_back(text_from_field(field));
  print_step("getFieldsToSerialize", {{"fields", json(texts)}});
  return built;
}

Running::Running(IPluginCreatorV3One& creator, const Logger& logger, const std::vector<Field>& fields)
    : logger_(logger), loaded_(create(creator, logger, fields, TensorRTPhase::kRUNTIME)) {
  auto& runtime = capability<IPluginV3OneRuntime>(*loaded_, PluginCapabilityType::kRUNTIME);
  attached_.reset(runtime.attachToContext(nullptr));
  if (attached_ == nullptr || attached_ == loaded_)
    throw logger.failure("attachToContext gave no plugin of its own");
  runtime_ = &capability<IPluginV3OneRuntime>(*attached_, PluginCapabilityType::kRUNTIME);
  print_step("attachToContext", {});
}

void Running::change_shape(const Descriptions& tensors) {
  const int32_t code = runtime_->onShapeChange(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs);
  if (code != 0) throw logger_.failure("onShapeChange returned " + std::to_string(code));
  const Dims& projected = tensors[tensorrt::kProjected].dims;
  print_step("onShapeChange",
             {{"batch", json(int64_t{projected.d[0]})}, {"tokens", json(int64_t{projected.d[1]})}});
}

void Running::enqueue(const Descriptions& tensors, const void* const* inputs, void* const* outputs,
                      void* workspace, void* stream) {
  const int32_t code = runtime_->enqueue(tensors.data(), tensors.data() + kInputs, inputs, outputs, workspace,
                                         static_cast<cudaStream_t>(stream));
  if (code != 0) throw logger_.failure("enqueue returned " + std::to_string(code));
}

}  // namespace mmm::host
