#include "host/product.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#include "host/expressions.h"
#include "host/failure.h"
#include "host/json_lines.h"
#include "host/life_cycle.h"
#include "tensorrt/linear_geometry.h"

namespace mmm::host {
namespace {

using namespace nvinfer1;

constexpr const char* kNames[] = {"x", "weight", "scales", "norm_weight", "residual"};

// The inputs that lie in the folder, in the operator's order. Whether the fields call for them is the plugin's matter.
std::vector<Array> present_inputs(const Options& options) {
  std::vector<Array> arrays;
  for (const char* name : kNames) {
    const std::string path = options.inputs + "/" + name + ".npy";
    const bool needed = arrays.size() < 2;
    if (needed || std::ifstream(path)) arrays.push_back(read_input(path, options.bfloat16));
  }
  return arrays;
}

PluginTensorDesc infer_output(IPluginV3OneBuild& plugin, const Logger& logger,
                              const std::vector<PluginTensorDesc>& inputs) {
  const int32_t count = static_cast<int32_t>(inputs.size());
  std::vector<DataType> types(count);
  std::vector<DimsExprs> dims(count);
  ExpressionBuilder builder;
  for (int32_t i = 0; i < count; ++i) {
    types[i] = inputs[i].type;
    dims[i].nbDims = inputs[i].dims.nbDims;
    for (int32_t k = 0; k < dims[i].nbDims; ++k) dims[i].d[k] = builder.constant(inputs[i].dims.d[k]);
  }
  if (plugin.getNbOutputs() != 1) throw Failure("the plugin has another number of outputs");
  DataType type;
  DimsExprs out;
  if (plugin.getOutputDataTypes(&type, 1, types.data(), count) != 0) throw logger.failure("getOutputDataTypes failed");
  if (plugin.getOutputShapes(dims.data(), count, nullptr, 0, &out, 1, builder) != 0)
    throw logger.failure("getOutputShapes failed");
  std::vector<int64_t> shape;
  for (int32_t k = 0; k < out.nbDims; ++k) shape.push_back(out.d[k]->getConstantValue());
  print_step("getOutputShapes", {{"outputs", json(std::vector<std::string>{type_name(type) + shape_text(shape)})}});
  return describe(type, shape);
}

void check_formats(IPluginV3OneBuild& plugin, const std::vector<DynamicPluginTensorDesc>& tensors) {
  const int32_t inputs = static_cast<int32_t>(tensors.size()) - 1;
  for (int32_t i = 0; i <= inputs; ++i) {
    std::vector<DynamicPluginTensorDesc> others = tensors;
    others[i].desc.format = TensorFormat::kCHW32;
    const bool linear_only = !plugin.supportsFormatCombination(i, others.data(), inputs, 1);
    print_step("supportsFormatCombination", {{"position", json(int64_t{i})}, {"linear_only", linear_only ? "true" : "false"}});
    if (!plugin.supportsFormatCombination(i, tensors.data(), inputs, 1)) {
      throw Failure("supportsFormatCombination refuses tensor " + std::to_string(i), type_name(tensors[i].desc.type),
                    "the type that the fields call for");
    }
  }
}

}  // namespace

void drive_product(const Options& options, Logger& logger) {
  const std::vector<Array> arrays = present_inputs(options);
  const int32_t count = static_cast<int32_t>(arrays.size());
  std::vector<PluginTensorDesc> tensors;
  for (const Array& array : arrays) tensors.push_back(describe(data_type(array.type), array.shape));

  IPluginCreatorV3One& creator = load_creator(options.library, options.operator_name, logger);
  const auto created = create(creator, logger, options.fields, TensorRTPhase::kBUILD);
  const std::unique_ptr<IPluginV3> plugin(created->clone());  // TensorRT works on clones
  auto& asked = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
  tensors.push_back(infer_output(asked, logger, tensors));
  std::vector<DynamicPluginTensorDesc> dynamic(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    dynamic[i].desc = tensors[i];
    dynamic[i].min = dynamic[i].opt = dynamic[i].max = tensors[i].dims;
  }
  check_formats(asked, dynamic);
  if (asked.configurePlugin(dynamic.data(), count, dynamic.data() + count, 1) != 0)
    throw logger.failure("configurePlugin failed");
  const size_t workspace_bytes = asked.getWorkspaceSize(dynamic.data(), count, dynamic.data() + count, 1);
  print_step("getWorkspaceSize", {{"bytes", json(static_cast<int64_t>(workspace_bytes))}});
  const auto* stored = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME).getFieldsToSerialize();
  if (stored == nullptr) throw logger.failure("getFieldsToSerialize gave nothing");
  const std::vector<Field> fields = fields_from_collection(*stored);
  std::vector<std::string> texts;
  for (const Field& field : fields) texts.push_back(text_from_field(field));
  print_step("getFieldsToSerialize", {{"fields", json(texts)}});
  if (!options.serialize.empty()) write_fields(options.serialize, fields);

  const auto loaded =
      create(creator, logger, options.deserialize.empty() ? fields : fields_from_file(options.deserialize), TensorRTPhase::kRUNTIME);
  const std::unique_ptr<IPluginV3> attached(
      capability<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME).attachToContext(nullptr));
  if (attached == nullptr) throw logger.failure("attachToContext gave no plugin of its own");
  auto& running = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
  const int32_t code = running.onShapeChange(tensors.data(), count, tensors.data() + count, 1);
  if (code != 0) throw logger.failure("onShapeChange returned " + std::to_string(code));

  const Stream stream(options.device);
  std::vector<Buffer> buffers;
  std::vector<const void*> inputs;
  for (int32_t i = 0; i < count; ++i) {
    buffers.emplace_back(options.device, kNames[i], arrays[i].bytes.size());
    buffers.back().upload(arrays[i].bytes);
    inputs.push_back(buffers.back().data());
  }
  const std::vector<int64_t> shape = shape_of(tensors[count].dims);
  const ElementType type = element_type(tensors[count].type);
  buffers.emplace_back(options.device, "out", static_cast<size_t>(element_count(shape) * element_bytes(type)));
  const Buffer& out = buffers.back();
  const Buffer workspace(options.device, "the workspace", workspace_bytes);
  void* const outputs[] = {out.data()};
  const auto call = [&] {
    if (running.enqueue(tensors.data(), tensors.data() + count, inputs.data(), outputs, workspace.data(),
                        static_cast<cudaStream_t>(stream.get())) != 0)
      throw logger.failure("enqueue failed");
  };
  call();
  stream.wait();
  for (const Buffer& each : buffers) each.check_guard();
  workspace.check_guard();
  print_step("enqueue", {{"calls", json(int64_t{1})}});
  write_npy(options.outputs + "/out.npy", Array{type, shape, out.download()});
  if (options.time > 0) {
    const double mean = stream.time(options.time, options.graph, call);
    print_step("time", {{"calls", json(options.time)}, {"microseconds", json(mean)}});
  }
}

}  // namespace mmm::host
