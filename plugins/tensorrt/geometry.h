// From TensorRT's tensor descriptions to the shape of a call, and what is wrong with them.
#ifndef MMM_TENSORRT_GEOMETRY_H
#define MMM_TENSORRT_GEOMETRY_H

#include <cstdint>

#include "NvInferRuntime.h"
#include "mmm/kernels.h"
#include "tensorrt/fields.h"

namespace mmm::tensorrt {

// The dimensions and types of all inputs and outputs, by position.
struct Tensors {
  nvinfer1::Dims dims[kTensors];
  nvinfer1::DataType types[kTensors];
};

// The descriptions of a call.
Tensors tensors_of(const nvinfer1::PluginTensorDesc* inputs,
                   const nvinfer1::PluginTensorDesc* outputs) noexcept;

// The inputs of the largest call of a profile. Outputs are left empty: they follow from the inputs.
Tensors largest_of(const nvinfer1::DynamicPluginTensorDesc* inputs) noexcept;

// Whether kernels exist for `fields`. False after logging why not.
bool check_fields(const char* layer, const Fields& fields) noexcept;

// Fill `shape` from checked dimensions and types. Returns false, after logging which tensor is wrong, what it
// is and what is wanted. With `bounds`, of a profile, outputs are not looked at, and batch and tokens need
// not agree: bounds may be looser than any call.
bool read_shape(const char* layer, const Fields& fields, const Tensors& tensors, bool bounds,
                mmm_scan_shape& shape) noexcept;

// Width of a row of y, H*P.
inline int64_t output_width(const Fields& fields) { return int64_t{fields.heads} * fields.head_dim; }

// Whether a tensor at `position` may have its type, given those of the positions before it.
bool type_allowed(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors) noexcept;

// Whether there are `inputs` and `outputs` as the operator has. False after logging that there are not.
bool check_counts(const char* layer, int32_t inputs, int32_t outputs) noexcept;

}  // namespace mmm::tensorrt

#endif
