// The inputs, outputs and attributes of mmm::MmmSelectiveScan, in the order in which a node lists them.
#ifndef MMM_ONNXRUNTIME_SIGNATURE_H
#define MMM_ONNXRUNTIME_SIGNATURE_H

#include <cstddef>

namespace mmm::ort {

constexpr char kDomain[] = "mmm";
constexpr char kOperator[] = "MmmSelectiveScan";
constexpr char kPluginVersion[] = "1";  // of the node's meaning; frozen

enum Input : size_t {
  kProjected,   // (B, T, W) the type of inputs and outputs: float32, float16 or bfloat16
  kLengths,     // (B,) int32
  kConvState,   // (B, C, K-1) as projected
  kSsmState,    // (B, H, P, N) float32
  kConvWeight,  // (C, K) float32, as all weights
  kConvBias,    // (C,)
  kDtBias,      // (H,)
  kALog,        // (H,)
  kNormWeight,  // (P,)
  kInputs
};

enum Output : size_t {
  kY,             // (B, T, H*P) as projected
  kConvStateOut,  // (B, C, K-1) as projected
  kSsmStateOut,   // (B, H, P, N) float32
  kOutputs
};

constexpr const char* kInputNames[kInputs] = {"projected", "lengths",     "conv_state",
                                              "ssm_state", "conv_weight", "conv_bias",
                                              "dt_bias",   "A_log",       "norm_weight"};

// Whether the input, or output, has the type of `projected`.
constexpr bool has_io_type(Input input) { return input == kProjected || input == kConvState; }
constexpr bool has_io_type(Output output) { return output != kSsmStateOut; }

}  // namespace mmm::ort

#endif
