// One node mmm::MmmSelectiveScan of a loaded graph: its attributes, and how a call is made of its inputs.
#ifndef MMM_ONNXRUNTIME_KERNEL_H
#define MMM_ONNXRUNTIME_KERNEL_H

#include <cstdint>

#include "mmm/kernels.h"
#include "onnxruntime/runtime_api.h"
#include "onnxruntime/signature.h"

namespace mmm::ort {

class Kernel {
 public:
  // Reads the attributes and checks them and the weights that are constants. Throws Failure.
  Kernel(const OrtApi& api, const OrtKernelInfo* info, mmm_dtype io_dtype, mmm_device device);

  // Computes on the CPU, or enqueues on the provider's stream. ONNX Runtime may call it from several threads
  // at once. Throws Failure.
  void compute(OrtKernelContext* context) const;

 private:
  mmm_scan_shape shape_of_call(const Shape& projected, int64_t conv_width) const;
  Shape wanted_shape(Input input, const mmm_scan_shape& call) const;
  void check_shape(Input input, const OrtValue* value, const mmm_scan_shape& call) const;

  const OrtApi& api_;
  mmm_scan_shape shape_{};         // batch, tokens and, unless it is known, conv_width are those of a call
  bool is_checked_[kInputs] = {};  // constants, whose shapes were checked once and for all
  bool conv_width_is_known_ = false;
  int32_t overlap_ = 0;  // of mmm_scan_args
};

}  // namespace mmm::ort

#endif
