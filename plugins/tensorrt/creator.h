// Makes plugins: from the attributes of an ONNX node when an engine is built, from the fields in an engine
// when it is loaded.
#ifndef MMM_TENSORRT_CREATOR_H
#define MMM_TENSORRT_CREATOR_H

#include "NvInferRuntime.h"
#include "tensorrt/fields.h"

namespace mmm::tensorrt {

class SelectiveScanCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  SelectiveScanCreator() noexcept;

  // Null, after logging why, when the fields are wrong.
  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  // Names and types of the fields; the parsers read the attributes so named.
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  nvinfer1::PluginField rows_[kFieldCount];
  nvinfer1::PluginFieldCollection names_{};
};

}  // namespace mmm::tensorrt

#endif
