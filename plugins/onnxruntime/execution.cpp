#include "onnxruntime/execution.h"

#include <algorithm>

#include "abi/backend.h"
#include "abi/check.h"
#include "cpu/reference.h"
#include "onnxruntime/cublas.h"

#ifndef MMM_WITH_CUDA
#define MMM_WITH_CUDA 0
#endif

namespace mmm::ort {
namespace {

OrtErrorCode code_of(int32_t code) {
  switch (code) {
    case MMM_INVALID_ARGUMENT: return ORT_INVALID_ARGUMENT;
    case MMM_UNSUPPORTED: return ORT_NOT_IMPLEMENTED;
    default: return ORT_FAIL;
  }
}

// As mmm_selective_scan does it, but with the heads spread over ONNX Runtime's threads.
void run_on_cpu(const OrtApi& api, OrtKernelContext* context, const mmm_scan_args& args) {
  mmm_status status{};
  check_status(api, check_shape(args.shape, status), status);
  check_status(api, check_arguments(args, 0, status), status);
  const auto run_head = [](void* data, size_t i) {
    const mmm_scan_args& shared = *static_cast<const mmm_scan_args*>(data);
    const size_t heads = static_cast<size_t>(shared.shape.heads);
    scan_head_cpu(shared, static_cast<int64_t>(i / heads), static_cast<int64_t>(i % heads));
  };
  const size_t heads = static_cast<size_t>(args.shape.batch) * static_cast<size_t>(args.shape.heads);
  constexpr size_t kAsManyAsThreads = 0;
  check(api.KernelContext_ParallelFor(context, run_head, heads, kAsManyAsThreads,
                                      const_cast<mmm_scan_args*>(&args)));
}

// Memory of the execution provider. Giving it back at once is safe, since all who get it next run later on
// the same stream; and its arena keeps it, so that only the largest call so far asks the device for memory,
// and none does while a CUDA graph is captured.
class Workspace {
 public:
  Workspace(const OrtApi& api, const OrtKernelContext* context, const OrtValue* input, uint64_t bytes)
      : api_(api) {
    const OrtMemoryInfo* place = nullptr;
    check(api.GetTensorMemoryInfo(input, &place));
    check(api.KernelContext_GetAllocator(context, place, &allocator_));
    if (OrtStatus* status = api.AllocatorAlloc(allocator_, static_cast<size_t>(bytes), &data_)) {
      api.ReleaseAllocator(allocator_);
      throw Failure{status};
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (OrtStatus* status = api_.AllocatorFree(allocator_, data_)) api_.ReleaseStatus(status);
    api_.ReleaseAllocator(allocator_);
  }

  void* data() const { return data_; }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// The same for products, by blocks of columns.
void run_on_cpu(const OrtApi& api, OrtKernelContext* context, const mmm_linear_args& args) {
  mmm_status status{};
  check_status(api, check_shape(args.shape, status), status, kLinearName);
  check_status(api, check_arguments(args, 0, status), status, kLinearName);
  if (args.shape.tokens == 0) return;
  const auto run_block = [](void* data, size_t i) {
    const mmm_linear_args& shared = *static_cast<const mmm_linear_args*>(data);
    const int64_t first = static_cast<int64_t>(i) * kLinearColumns;
    linear_columns_cpu(shared, first, std::min(first + kLinearColumns, linear_columns(shared.shape)));
  };
  const size_t blocks = static_cast<size_t>((linear_columns(args.shape) + kLinearColumns - 1) / kLinearColumns);
  constexpr size_t kAsManyAsThreads = 0;
  check(api.KernelContext_ParallelFor(context, run_block, blocks, kAsManyAsThreads,
                                      const_cast<mmm_linear_args*>(&args)));
}

template <class Args, class Query, class Call>
void run_on_cuda(const OrtApi& api, OrtKernelContext* context, const OrtValue* input, Args& args,
                 const char* name, Query query, Call call) {
  mmm_status status{};
  check(api.KernelContext_GetGPUComputeStream(context, &args.stream));
  check_status(api, query(&args.shape, &args.workspace_bytes, &status), status, name);
  if (args.workspace_bytes == 0) {
    check_status(api, call(&args, &status), status, name);
    return;
  }
  const Workspace workspace(api, context, input, args.workspace_bytes);
  args.workspace = workspace.data();
  check_status(api, call(&args, &status), status, name);
}

#if MMM_WITH_CUDA
// Integer weights must be written out in 16 bits for it, which pays at more tokens, and not for a vocabulary.
bool is_for_cublas(const mmm_linear_shape& shape) {
  constexpr int64_t kMostWidened = int64_t{64} << 20;
  if (shape.epilogue == MMM_EPILOGUE_SILU && linear_columns(shape) % 8 != 0) return false;
  if (shape.weight_format == MMM_WEIGHT_PLAIN) return shape.tokens >= kCublasTokens;
  return shape.tokens >= kCublasWidenedTokens && int64_t{shape.outputs} * shape.inputs <= kMostWidened;
}
#endif

}  // namespace

void check_status(const OrtApi& api, int32_t code, const mmm_status& status, const char* name) {
  if (code != MMM_OK) fail(api, code_of(code), status.text, name);
}

void run_scan(const OrtApi& api, OrtKernelContext* context, const OrtValue* input, mmm_scan_args& args) {
  if (args.shape.device == MMM_CUDA) {
    run_on_cuda(api, context, input, args, kScanName, mmm_selective_scan_workspace, mmm_selective_scan);
  } else {
    run_on_cpu(api, context, args);
  }
}

void run_linear(const OrtApi& api, OrtKernelContext* context, const OrtValue* input, mmm_linear_args& args) {
#if MMM_WITH_CUDA
  Cublas cublas;
  const mmm_linear_shape& shape = args.shape;
  if (shape.device == MMM_CUDA && is_for_cublas(shape) && cublas.open(api, context)) {
    const auto query = [&](const mmm_linear_shape* s, uint64_t* bytes, mmm_status* status) {
      uint64_t least = 0;
      const int32_t code = mmm_linear_workspace(s, &least, status);  // checks the shape
      *bytes = linear_workspace_cuda(*s, cublas);
      return code;
    };
    const auto call = [&](const mmm_linear_args* a, mmm_status* status) {
      const int32_t code = check_arguments(*a, a->workspace_bytes, *status);
      return code != MMM_OK ? code : linear_cuda(*a, cublas, *status);
    };
    run_on_cuda(api, context, input, args, kLinearName, query, call);
    return;
  }
#endif
  if (args.shape.device == MMM_CUDA) {
    run_on_cuda(api, context, input, args, kLinearName, mmm_linear_workspace, mmm_linear);
  } else {
    run_on_cpu(api, context, args);
  }
}

}  // namespace mmm::ort
