// The tensors of a call as TensorRT describes them.
#ifndef MMM_HOST_TENSORS_H
#define MMM_HOST_TENSORS_H

#include <array>
#include <string>
#include <vector>

#include "NvInferRuntime.h"
#include "host/npy.h"
#include "tensorrt/signature.h"

namespace mmm::host {

using tensorrt::kInputs;
using tensorrt::kOutputs;
using tensorrt::kTensorNames;
using tensorrt::kTensors;

// By position: inputs, then outputs.
using Descriptions = std::array<nvinfer1::PluginTensorDesc, kTensors>;

// One array an input, by position, and whether its uint16 elements are bfloat16.
struct Inputs {
  std::vector<Array> arrays;
  bool bfloat16 = false;
};

// One array. Throws Failure for a missing file, or for uint16 without `bfloat16`.
Array read_input(const std::string& path, bool bfloat16);

// The arrays NAME.npy of `folder`. Throws Failure for a missing file, or for uint16 without `bfloat16`.
Inputs read_inputs(const std::string& folder, bool bfloat16);

nvinfer1::PluginTensorDesc describe(nvinfer1::DataType type, const std::vector<int64_t>& shape);
nvinfer1::DataType data_type(ElementType type);
ElementType element_type(nvinfer1::DataType type);
const char* type_name(nvinfer1::DataType type);
std::vector<int64_t> shape_of(const nvinfer1::Dims& dims);

// Batch and tokens of a call.
struct CallSize {
  int64_t batch, tokens;
};

// `dims` of the tensor at `position` with its batch and token dimensions replaced.
nvinfer1::Dims resized(int32_t position, nvinfer1::Dims dims, CallSize size);

}  // namespace mmm::host

#endif
