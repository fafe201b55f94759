#include "host/tensors.h"

#include "host/failure.h"

namespace mmm::host {

using nvinfer1::DataType;

DataType data_type(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return DataType::kFLOAT;
    case ElementType::kFloat16: return DataType::kHALF;
    case ElementType::kInt32: return DataType::kINT32;
    case ElementType::kUint16: return DataType::kBF16;
    case ElementType::kInt8: return DataType::kINT8;
  }
  throw Failure("an array has an unknown type");
}

ElementType element_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return ElementType::kFloat32;
    case DataType::kHALF: return ElementType::kFloat16;
    case DataType::kINT32: return ElementType::kInt32;
    case DataType::kBF16: return ElementType::kUint16;
    case DataType::kINT8: return ElementType::kInt8;
    default:
      throw Failure("a tensor has a type that has no .npy form", type_name(type),
                    "float32, float16, bfloat16, int32 or int8");
  }
}

const char* type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kBOOL: return "bool";
    case DataType::kUINT8: return "uint8";
    case DataType::kFP8: return "fp8";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT64: return "int64";
    default: return "another type";
  }
}

Array read_input(const std::string& path, bool bfloat16) {
  Array array = read_npy(path);
  if (array.type == ElementType::kUint16 && !bfloat16) {
    throw Failure(path + " holds integers", "uint16", "a float type, or --bfloat16 if these are bfloat16 bits");
  }
  return array;
}

Inputs read_inputs(const std::string& folder, bool bfloat16) {
  Inputs inputs{{}, bfloat16};
  for (int32_t i = 0; i < kInputs; ++i) {
    const std::string path = folder + "/" + kTensorNames[i] + ".npy";
    inputs.arrays.push_back(read_input(path, bfloat16));
  }
  return inputs;
}

nvinfer1::PluginTensorDesc describe(DataType type, const std::vector<int64_t>& shape) {
  nvinfer1::PluginTensorDesc desc{};
  desc.type = type;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  desc.scale = 1;
  desc.dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) desc.dims.d[i] = shape[i];
  return desc;
}

std::vector<int64_t> shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

nvinfer1::Dims resized(int32_t position, nvinfer1::Dims dims, CallSize size) {
  const bool has_tokens = position == tensorrt::kProjected || position == kInputs + tensorrt::kY;
  const bool is_weight = position >= tensorrt::kConvWeight && position <= tensorrt::kNormWeight;
  if (!is_weight && dims.nbDims > 0) dims.d[0] = size.batch;
  if (has_tokens && dims.nbDims > 1) dims.d[1] = size.tokens;
  return dims;
}

}  // namespace mmm::host
