// Name, inputs, outputs and types of the operator MmmSelectiveScan as TensorRT sees it.
#ifndef MMM_TENSORRT_SIGNATURE_H
#define MMM_TENSORRT_SIGNATURE_H

#include <cstdint>

namespace mmm::tensorrt {

constexpr char kName[] = "MmmSelectiveScan";
constexpr char kVersion[] = "1";  // of the fields and their meaning; engines hold it, so it is frozen
// Parsers before TensorRT 10.10 know no namespaces; the empty one is found by every parser, whatever the
// node's domain.
constexpr char kNamespace[] = "";

enum Input : int32_t {
  kProjected,   // (B, T, W) io type: float32, float16 or bfloat16
  kLengths,     // (B,) int32
  kConvState,   // (B, C, K-1) io type
  kSsmState,    // (B, H, P, N) float32; float16 and bfloat16 where memory is short
  kConvWeight,  // (C, K) float32, as all weights
  kConvBias,    // (C,)
  kDtBias,      // (H,)
  kALog,        // (H,)
  kNormWeight,  // (P,)
  kInputs
};

enum Output : int32_t {
  kY,             // (B, T, H*P) io type
  kConvStateOut,  // as kConvState
  kSsmStateOut,   // as kSsmState
  kOutputs
};

constexpr int32_t kTensors = kInputs + kOutputs;

// By position: all inputs, then all outputs.
constexpr const char* kTensorNames[kTensors] = {
    "projected", "lengths", "conv_state",  "ssm_state", "conv_weight",    "conv_bias",
    "dt_bias",   "A_log",   "norm_weight", "y",         "conv_state_out", "ssm_state_out"};

}  // namespace mmm::tensorrt

#endif
