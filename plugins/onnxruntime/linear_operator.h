// mmm::MmmLinear as ONNX Runtime wants an operator described: once for each type and execution provider.
#ifndef MMM_ONNXRUNTIME_LINEAR_OPERATOR_H
#define MMM_ONNXRUNTIME_LINEAR_OPERATOR_H

#include "mmm/kernels.h"
#include "onnxruntime/runtime_api.h"

namespace mmm::ort {

// Must outlive every session that it was registered for.
class LinearOperator : public OrtCustomOp {
 public:
  LinearOperator(const OrtApi& api, mmm_dtype io_dtype, mmm_device device);

 private:
  static const LinearOperator& of(const OrtCustomOp* base) { return *static_cast<const LinearOperator*>(base); }
  void infer_shapes(OrtShapeInferContext* context) const;
  int64_t kept_rows(OrtShapeInferContext* context) const;
  int64_t attribute(OrtShapeInferContext* context, const char* name) const;

  const OrtApi& api_;
  mmm_dtype io_dtype_;
  mmm_device device_;
};

}  // namespace mmm::ort

#endif
