// MmmSelectiveScan as a TensorRT plugin: converts descriptions and pointers, calls the C interface, logs what
// it says.
//
// Uses what TensorRT 10.3, 11.x and TensorRT-RTX have in common. getAliasedInput is left out on purpose: it
// would cut the plugin out of the fused region around it. In-place state is had by binding one address to the
// engine's input and output.
#ifndef MMM_TENSORRT_PLUGIN_H
#define MMM_TENSORRT_PLUGIN_H

#include "NvInferRuntime.h"
#include "tensorrt/fields.h"

namespace mmm::tensorrt {

class SelectiveScanPlugin final : public nvinfer1::IPluginV3,
                                  public nvinfer1::IPluginV3OneCore,
                                  public nvinfer1::IPluginV3OneBuild,
                                  public nvinfer1::IPluginV3OneRuntime {
 public:
  // `fields` are checked. `layer` is the node's name, for messages; may be null.
  SelectiveScanPlugin(const char* layer, const Fields& fields) noexcept;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;

  // Runtime
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

 private:
  char layer_[128];
  Fields fields_;
  SerializedFields serialized_;
};

}  // namespace mmm::tensorrt

#endif
