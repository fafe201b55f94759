// The matrix product of the cuBLAS that ONNX Runtime's CUDA provider has loaded. Nothing is linked: where it is not found, our own kernel
// computes.
#ifndef MMM_ONNXRUNTIME_CUBLAS_H
#define MMM_ONNXRUNTIME_CUBLAS_H

#include "abi/backend.h"
#include "onnxruntime/runtime_api.h"

namespace mmm::ort {

class Cublas : public ForeignProduct {
 public:
  // Whether cuBLAS is there, and the provider lends its handle, which enqueues on the node's stream.
  bool open(const OrtApi& api, const OrtKernelContext* context);

  bool enqueue(const mmm_linear_shape& shape, const void* x, const void* weight, void* out, int32_t out_dtype,
               bool accumulate) const override;

 private:
  void* handle_ = nullptr;
};

// Fewer tokens than this, of plain and of integer weights, are left to our own kernels, which read a weight faster.
constexpr int32_t kCublasTokens = 9, kCublasWidenedTokens = 64;

}  // namespace mmm::ort

#endif
