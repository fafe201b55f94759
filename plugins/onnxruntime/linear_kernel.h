// One node mmm::MmmLinear of a loaded graph: its attributes, and how a call is made of its inputs.
#ifndef MMM_ONNXRUNTIME_LINEAR_KERNEL_H
#define MMM_ONNXRUNTIME_LINEAR_KERNEL_H

#include <cstdint>

#include "mmm/kernels.h"
#include "onnxruntime/linear_signature.h"
#include "onnxruntime/runtime_api.h"

namespace mmm::ort {

class LinearKernel {
 public:
  // Reads the attributes and checks them and the inputs that are constants. Throws Failure.
  LinearKernel(const OrtApi& api, const OrtKernelInfo* info, mmm_dtype io_dtype, mmm_device device);

  // Computes on the CPU, or enqueues on the provider's stream. ONNX Runtime may call it from several threads at once. Throws Failure.
  void compute(OrtKernelContext* context) const;

 private:
  enum Role { kX, kWeight, kScales, kNormWeight, kResidual, kKept, kRoles };

  // An input as a call brings it.
  struct Operand {
    const OrtValue* value = nullptr;
    void* data = nullptr;
    Shape shape;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };

  Operand operand_of(const OrtValue* value) const;
  // Fills outputs, inputs and scale_dtype of `call` from the weight, and checks all weights that `operands` has.
  void check_weights(const Operand (&operands)[kRoles], mmm_linear_shape& call) const;
  void check(Role role, const Operand& operand, const Shape& wanted, ONNXTensorElementDataType type) const;
  ONNXTensorElementDataType io_type() const;

  const OrtApi& api_;
  mmm_linear_shape shape_{};  // tokens, outputs, inputs, kept and scale_dtype are those of a call
  size_t position_[kRoles];   // of an input among those of the node; kAbsent if it has none
  size_t inputs_ = 0;
  bool weights_are_constant_ = true;
};

}  // namespace mmm::ort

#endif
