// The inputs, output and attributes of mmm::MmmLinear, in the order in which a node lists them. No input is optional: a node has those
// that its attributes call for.
#ifndef MMM_ONNXRUNTIME_LINEAR_SIGNATURE_H
#define MMM_ONNXRUNTIME_LINEAR_SIGNATURE_H

#include <cstddef>

namespace mmm::ort {

constexpr char kLinearOperator[] = "MmmLinear";
constexpr char kLinearPluginVersion[] = "1";  // of the node's meaning; frozen

//   x            (..., K) float32, float16 or bfloat16
//   weight       (N, K) as x; int8 for INT8; int8 (N, K/2) for INT4, whose bytes kernels.h describes
//   scales       unless weight_format is 0: (N,) float32 for INT8, (N, K/128) float16 or bfloat16 for INT4
//   norm_weight  if normalise: (K,) as x
//   residual     if epilogue is 1: (..., N) as x
//   kept_weight  if the attribute keeps_rows is there and 1: (kept, K) as x, the last rows of the weight; then N counts them too, and
//                weight and scales lack them
//   out          (..., N), or (..., N/2) if epilogue is 2; as x, or float32 if float32_output
constexpr size_t kLinearX = 0, kLinearWeight = 1, kLinearMostInputs = 6, kLinearLeastInputs = 2;

}  // namespace mmm::ort

#endif
