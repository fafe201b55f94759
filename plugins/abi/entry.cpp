// The functions of kernels.h: check the call, then hand it to the device's backend.
#include <cstdio>

#include "abi/backend.h"
#include "abi/check.h"

#ifndef MMM_WITH_CUDA
#define MMM_WITH_CUDA 0
#endif
#ifndef MMM_VERSION
#define MMM_VERSION "0"
#endif
#ifndef MMM_ARCHITECTURES
#define MMM_ARCHITECTURES ""
#endif

#if MMM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#define MMM_TEXT_OF(number) #number
#define MMM_TEXT(number) MMM_TEXT_OF(number)

#if defined(__clang__)
#define MMM_COMPILER "clang " MMM_TEXT(__clang_major__) "." MMM_TEXT(__clang_minor__) "." MMM_TEXT(__clang_patchlevel__)
#elif defined(__GNUC__)
#define MMM_COMPILER "gcc " MMM_TEXT(__GNUC__) "." MMM_TEXT(__GNUC_MINOR__) "." MMM_TEXT(__GNUC_PATCHLEVEL__)
#else
#define MMM_COMPILER "unknown"
#endif

namespace {

struct BuildInfo {
  char text[512];

  BuildInfo() {
    char cuda[32] = "null";
#if MMM_WITH_CUDA
    std::snprintf(cuda, sizeof cuda, "\"%d.%d\"", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
#endif
    std::snprintf(text, sizeof text,
                  "{\"version\": \"%s\", \"abi\": %d, \"cuda\": %s, \"architectures\": [%s], \"compiler\": \"%s\"}",
                  MMM_VERSION, MMM_ABI_VERSION, cuda, MMM_ARCHITECTURES, MMM_COMPILER);
  }
};

const BuildInfo build_info;  // not local to the function: its guard would need the C++ runtime library

int32_t check_device(int32_t device, mmm_status& status) {
  if (device == MMM_CPU || MMM_WITH_CUDA) return MMM_OK;
  return mmm::fail(status, MMM_UNSUPPORTED,
                   "device is CUDA, but this library was built without CUDA; rebuild it where nvcc is: mmm-export "
                   "plugins build --cuda-arch 87");
}

uint64_t workspace_of(const mmm_scan_shape& shape) {
#if MMM_WITH_CUDA
  if (shape.device == MMM_CUDA) return mmm::workspace_cuda(shape);
#endif
  static_cast<void>(shape);
  return 0;
}

uint64_t workspace_of(const mmm_linear_shape& shape) {
#if MMM_WITH_CUDA
  if (shape.device == MMM_CUDA) return mmm::linear_workspace_cuda(shape);
#endif
  static_cast<void>(shape);
  return 0;
}

void clear(mmm_status& status) {
  status.code = MMM_OK;
  status.text[0] = '\0';
}

// What the workspace queries of all operators do, and what their calls do before they run.
template <typename Shape>
int32_t workspace_query(const Shape* shape, const char* type, uint64_t* bytes, mmm_status* status) {
  mmm_status unseen;
  mmm_status& told = status != nullptr ? *status : unseen;
  clear(told);
  if (shape == nullptr) return mmm::fail(told, MMM_INVALID_ARGUMENT, "shape is NULL; wanted a %s", type);
  if (bytes == nullptr) return mmm::fail(told, MMM_INVALID_ARGUMENT, "bytes is NULL; wanted a place for the answer");
  if (const int32_t code = mmm::check_shape(*shape, told)) return code;
  if (const int32_t code = check_device(shape->device, told)) return code;
  *bytes = workspace_of(*shape);
  return MMM_OK;
}

template <typename Args>
int32_t check_call(const Args* args, const char* type, mmm_status& told) {
  clear(told);
  if (args == nullptr) return mmm::fail(told, MMM_INVALID_ARGUMENT, "args is NULL; wanted a %s", type);
  if (const int32_t code = mmm::check_shape(args->shape, told)) return code;
  if (const int32_t code = check_device(args->shape.device, told)) return code;
  return mmm::check_arguments(*args, workspace_of(args->shape), told);
}

}  // namespace

int32_t mmm_abi_version(void) { return MMM_ABI_VERSION; }

const char* mmm_build_info(void) { return build_info.text; }

int32_t mmm_selective_scan_workspace(const mmm_scan_shape* shape, uint64_t* bytes, mmm_status* status) {
  return workspace_query(shape, "mmm_scan_shape", bytes, status);
}

int32_t mmm_selective_scan(const mmm_scan_args* args, mmm_status* status) {
  mmm_status unseen;
  mmm_status& told = status != nullptr ? *status : unseen;
  if (const int32_t code = check_call(args, "mmm_scan_args", told)) return code;
  if (args->shape.batch == 0) return MMM_OK;
#if MMM_WITH_CUDA
  if (args->shape.device == MMM_CUDA) return mmm::scan_cuda(*args, told);
#endif
  return mmm::scan_cpu(*args, told);
}

int32_t mmm_linear_workspace(const mmm_linear_shape* shape, uint64_t* bytes, mmm_status* status) {
  return workspace_query(shape, "mmm_linear_shape", bytes, status);
}

int32_t mmm_linear(const mmm_linear_args* args, mmm_status* status) {
  mmm_status unseen;
  mmm_status& told = status != nullptr ? *status : unseen;
  if (const int32_t code = check_call(args, "mmm_linear_args", told)) return code;
  if (args->shape.tokens == 0) return MMM_OK;
#if MMM_WITH_CUDA
  if (args->shape.device == MMM_CUDA) return mmm::linear_cuda(*args, told);
#endif
  return mmm::linear_cpu(*args, told);
}
