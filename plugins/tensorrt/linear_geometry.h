// From TensorRT's tensor descriptions to the shape of a product, and what is wrong with them.
#ifndef MMM_TENSORRT_LINEAR_GEOMETRY_H
#define MMM_TENSORRT_LINEAR_GEOMETRY_H

#include <cstdint>

#include "NvInferRuntime.h"
#include "mmm/kernels.h"
#include "tensorrt/linear_plugin.h"

namespace mmm::tensorrt {

// What an input of the node is, by its position among those that the fields call for.
enum class LinearInput : int32_t { kX, kWeight, kScales, kNormWeight, kResidual };

constexpr int32_t kLinearMostInputs = 5;

// The inputs that a node with `fields` has, in order; returns how many.
int32_t linear_inputs(const LinearFields& fields, LinearInput (&inputs)[kLinearMostInputs]) noexcept;

// The dimensions and types of the inputs, by position, and of the output after them.
struct LinearTensors {
  nvinfer1::Dims dims[kLinearMostInputs + 1];
  nvinfer1::DataType types[kLinearMostInputs + 1];
};

// Whether the fields make sense. False after logging why not.
bool check_fields(const char* layer, const LinearFields& fields) noexcept;

// Fill `shape` from dimensions and types. Returns false, after logging which tensor is wrong, what it is and what is wanted. With
// `bounds`, of a profile, the output and the residual are not looked at.
bool read_shape(const char* layer, const LinearFields& fields, const LinearTensors& tensors, bool bounds,
                mmm_linear_shape& shape) noexcept;

// Whether the input, or after all of them the output, may have `type` where x has `x_type`.
bool linear_type_allowed(const LinearFields& fields, int32_t position, nvinfer1::DataType type,
                         nvinfer1::DataType x_type) noexcept;

}  // namespace mmm::tensorrt

#endif
