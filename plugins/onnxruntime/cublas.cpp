#include "onnxruntime/cublas.h"

#include <dlfcn.h>

namespace mmm::ort {
namespace {

// Of cublas_api.h and library_types.h, which are part of its interface and do not change.
constexpr int kTransposed = 1, kAsItIs = 0, kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14, kComputeFloat32 = 68, kAnyAlgorithm = -1;
using GemmEx = int (*)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                       const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm);

// Of core/providers/cuda/cuda_resource.h.
constexpr int kResourceVersion = 3, kCublasHandle = 10002;

GemmEx gemm_of_process() {
  static const GemmEx found = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "cublasGemmEx");
    for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
      if (symbol != nullptr) break;
      // Only one that is loaded already: the handle belongs to it.
      if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) symbol = dlsym(library, "cublasGemmEx");
    }
    return reinterpret_cast<GemmEx>(symbol);
  }();
  return found;
}

int type_of(int32_t dtype) {
  return dtype == MMM_FLOAT16 ? kFloat16 : dtype == MMM_BFLOAT16 ? kBfloat16 : kFloat32;
}

}  // namespace

bool Cublas::open(const OrtApi& api, const OrtKernelContext* context) {
  if (gemm_of_process() == nullptr) return false;
  if (OrtStatus* status = api.KernelContext_GetResource(context, kResourceVersion, kCublasHandle, &handle_)) {
    api.ReleaseStatus(status);
    return false;
  }
  return handle_ != nullptr;
}

// cuBLAS counts by columns, so what lies here by rows is the transpose there: out^T (N, M) = W (N, K) x^T (K, M).
bool Cublas::enqueue(const mmm_linear_shape& shape, const void* x, const void* weight, void* out, int32_t out_dtype,
                     bool accumulate) const {
  const float one = 1.f, beta = accumulate ? 1.f : 0.f;
  const int io = type_of(shape.io_dtype);
  return gemm_of_process()(handle_, kTransposed, kAsItIs, shape.outputs, shape.tokens, shape.inputs, &one, weight, io, shape.inputs, x,
                           io, shape.inputs, &beta, out, type_of(out_dtype), shape.outputs, kComputeFloat32, kAnyAlgorithm) == 0;
}

}  // namespace mmm::ort
