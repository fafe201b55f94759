// Runs a call with what ONNX Runtime offers: its threads on the CPU, its stream and its memory on a GPU.
#ifndef MMM_ONNXRUNTIME_EXECUTION_H
#define MMM_ONNXRUNTIME_EXECUTION_H

#include "mmm/kernels.h"
#include "onnxruntime/runtime_api.h"

namespace mmm::ort {

// Throw Failure with the text of `status`, of the operator `name`, unless `code` is MMM_OK.
void check_status(const OrtApi& api, int32_t code, const mmm_status& status, const char* name = kScanName);

// Compute, or enqueue, `args` on the device of its shape; fills in workspace and stream. `input` is any
// tensor of the node that lies in the provider's memory. Throws Failure.
void run_scan(const OrtApi& api, OrtKernelContext* context, const OrtValue* input, mmm_scan_args& args);
void run_linear(const OrtApi& api, OrtKernelContext* context, const OrtValue* input, mmm_linear_args& args);

}  // namespace mmm::ort

#endif
