// MmmLinear, a matrix product with its norm and epilogue, as a TensorRT plugin.
//
// Inputs are x (..., K), weight, and then scales, norm_weight and residual where the fields call for them; the output is (..., columns).
// A weight of integers is an int8 tensor: (N, K), or (N, K/2) bytes of two INT4 each, as kernels.h describes them.
#ifndef MMM_TENSORRT_LINEAR_PLUGIN_H
#define MMM_TENSORRT_LINEAR_PLUGIN_H

#include "NvInferRuntime.h"
#include "mmm/kernels.h"
#include "tensorrt/fields.h"

namespace mmm::tensorrt {

constexpr char kLinearName[] = "MmmLinear";
constexpr char kLinearVersion[] = "1";  // of the fields and their meaning; engines hold it, so it is frozen

struct LinearFields {
  int32_t weight_format = MMM_WEIGHT_PLAIN;
  int32_t normalise = 0;
  int32_t epilogue = MMM_EPILOGUE_NONE;
  int32_t float32_output = 0;
  float eps = 1e-5f;
};

constexpr FieldRow kLinearRows[] = {
    {"weight_format", nvinfer1::PluginFieldType::kINT32, offsetof(LinearFields, weight_format)},
    {"normalise", nvinfer1::PluginFieldType::kINT32, offsetof(LinearFields, normalise)},
    {"epilogue", nvinfer1::PluginFieldType::kINT32, offsetof(LinearFields, epilogue)},
    {"float32_output", nvinfer1::PluginFieldType::kINT32, offsetof(LinearFields, float32_output)},
    {"eps", nvinfer1::PluginFieldType::kFLOAT32, offsetof(LinearFields, eps)},
    {"plugin_version", nvinfer1::PluginFieldType::kCHAR, kConstant},
};
constexpr int32_t kLinearFieldCount = sizeof kLinearRows / sizeof kLinearRows[0];
constexpr FieldTable kLinearTable = {kLinearName, kLinearVersion, kLinearRows, kLinearFieldCount};

class LinearPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime {
 public:
  // `fields` are checked. `layer` is the node's name, for messages; may be null.
  LinearPlugin(const char* layer, const LinearFields& fields) noexcept;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kLinearName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kLinearVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return 1; }
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
  bool check_counts(int32_t inputs, int32_t outputs) const noexcept;

  char layer_[128];
  LinearFields fields_;
  nvinfer1::PluginField rows_[kLinearFieldCount];
  nvinfer1::PluginFieldCollection collection_{};
};

class LinearCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  LinearCreator() noexcept;

  // Null, after logging why, when the fields are wrong.
  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kLinearName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kLinearVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  nvinfer1::PluginField rows_[kLinearFieldCount];
  nvinfer1::PluginFieldCollection names_{};
};

}  // namespace mmm::tensorrt

#endif
