#include <cinttypes>
#include <cmath>

#include "abi/backend.h"
#include "abi/check.h"
#include "abi/region.h"

namespace mmm {
namespace {

constexpr int32_t kMostInputs = 32768;  // on CUDA: a row of x lies in a block's shared memory

bool is_half(int32_t dtype) { return dtype == MMM_FLOAT16 || dtype == MMM_BFLOAT16; }

int32_t check_types(const mmm_linear_shape& s, mmm_status& status) {
  if (const int32_t code = check_dtype("io_dtype", s.io_dtype, s.device, status)) return code;
  if (s.io_dtype == MMM_FLOAT64 || (s.device == MMM_CUDA && s.io_dtype == MMM_FLOAT32)) {
    return fail(status, MMM_UNSUPPORTED, "io_dtype %s has no kernel; built for %sfloat16, bfloat16", dtype_name(s.io_dtype),
                s.device == MMM_CUDA ? "" : "float32, ");
  }
  if (s.out_dtype != s.io_dtype && s.out_dtype != MMM_FLOAT32) {
    return fail(status, MMM_INVALID_ARGUMENT, "out_dtype is %d; wanted that of x (%s) or 0 (float32)", s.out_dtype,
                dtype_name(s.io_dtype));
  }
  switch (s.weight_format) {
    case MMM_WEIGHT_PLAIN: return MMM_OK;
    case MMM_WEIGHT_INT8:
      if (s.scale_dtype == MMM_FLOAT32) return MMM_OK;
      return fail(status, MMM_INVALID_ARGUMENT, "scale_dtype is %d; wanted 0 (float32) for an INT8 weight", s.scale_dtype);
    case MMM_WEIGHT_INT4:
      if (is_half(s.scale_dtype)) return MMM_OK;
      return fail(status, MMM_INVALID_ARGUMENT, "scale_dtype is %d; wanted 1 (float16) or 2 (bfloat16) for an INT4 weight",
                  s.scale_dtype);
    default:
      return fail(status, MMM_INVALID_ARGUMENT,
                  "weight_format is %d, which is no mmm_weight_format; wanted 0 (plain), 1 (INT8) or 2 (INT4)",
                  s.weight_format);
  }
}

int32_t check_sizes(const mmm_linear_shape& s, mmm_status& status) {
  if (s.tokens < 0) return fail(status, MMM_INVALID_ARGUMENT, "tokens is %d; wanted 0 or more", s.tokens);
  if (s.outputs < 1) return fail(status, MMM_INVALID_ARGUMENT, "outputs is %d; wanted 1 or more", s.outputs);
  if (s.inputs < 1) return fail(status, MMM_INVALID_ARGUMENT, "inputs is %d; wanted 1 or more", s.inputs);
  if (s.epilogue == MMM_EPILOGUE_SILU && s.outputs % 2 != 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "outputs is %d; wanted an even number for [gate | up]", s.outputs);
  }
  const bool may_keep = s.weight_format != MMM_WEIGHT_PLAIN && s.epilogue != MMM_EPILOGUE_SILU;
  if (s.kept < 0 || s.kept >= s.outputs || (s.kept > 0 && !may_keep)) {
    return fail(status, MMM_INVALID_ARGUMENT, "%d rows are kept; wanted 0%s", s.kept,
                may_keep ? " or more, and fewer than there are outputs" : ": the weight is plain, or [gate | up]");
  }
  if (s.weight_format == MMM_WEIGHT_INT4 && s.inputs % MMM_INT4_GROUP != 0) {
    return fail(status, MMM_UNSUPPORTED, "inputs %d has no INT4 kernel; wanted a multiple of %d, the inputs that share a scale",
                s.inputs, MMM_INT4_GROUP);
  }
  if (s.device == MMM_CUDA && (s.inputs % 16 != 0 || s.inputs > kMostInputs)) {
    return fail(status, MMM_UNSUPPORTED, "inputs %d has no kernel on CUDA; wanted a multiple of 16, at most %d", s.inputs,
                kMostInputs);
  }
  int64_t x = 8, weight = 8, out = 8;
  if (!grow(x, s.tokens) || !grow(x, s.inputs) || !grow(weight, s.outputs) || !grow(weight, s.inputs) ||
      !grow(out, s.tokens) || !grow(out, s.outputs)) {
    return fail(status, MMM_UNSUPPORTED, "%d tokens, %d inputs and %d outputs have more than 2^63 bytes", s.tokens, s.inputs,
                s.outputs);
  }
  return MMM_OK;
}

int64_t weight_bytes(const mmm_linear_shape& s) {
  const int64_t elements = int64_t{s.outputs - s.kept} * s.inputs;
  if (s.weight_format == MMM_WEIGHT_INT8) return elements;
  return s.weight_format == MMM_WEIGHT_INT4 ? elements / 2 : elements * element_bytes(s.io_dtype);
}

int64_t scale_bytes(const mmm_linear_shape& s) {
  if (s.weight_format == MMM_WEIGHT_INT8) return int64_t{s.outputs - s.kept} * element_bytes(s.scale_dtype);
  if (s.weight_format != MMM_WEIGHT_INT4) return 0;
  return int64_t{s.outputs - s.kept} * (s.inputs / MMM_INT4_GROUP) * element_bytes(s.scale_dtype);
}

}  // namespace

int32_t check_shape(const mmm_linear_shape& s, mmm_status& status) {
  if (s.abi_version != MMM_ABI_VERSION) {
    return fail(status, MMM_INVALID_ARGUMENT, "abi_version is %d; this library was built with %d", s.abi_version,
                MMM_ABI_VERSION);
  }
  if (s.device != MMM_CPU && s.device != MMM_CUDA) {
    return fail(status, MMM_INVALID_ARGUMENT, "device is %d; wanted 0 (CPU) or 1 (CUDA)", s.device);
  }
  if (const int32_t code = check_types(s, status)) return code;
  if (s.epilogue < MMM_EPILOGUE_NONE || s.epilogue > MMM_EPILOGUE_SILU) {
    return fail(status, MMM_INVALID_ARGUMENT,
                "epilogue is %d, which is no mmm_epilogue; wanted 0 (none), 1 (residual) or 2 (silu)", s.epilogue);
  }
  if (s.normalise != 0 && s.normalise != 1) {
    return fail(status, MMM_INVALID_ARGUMENT, "normalise is %d; wanted 0 or 1", s.normalise);
  }
  if (s.normalise && (!(s.eps > 0) || !std::isfinite(s.eps))) {
    return fail(status, MMM_INVALID_ARGUMENT, "eps is %g; wanted a finite number above 0", static_cast<double>(s.eps));
  }
  return check_sizes(s, status);
}

int32_t check_arguments(const mmm_linear_args& args, uint64_t workspace_bytes, mmm_status& status) {
  const mmm_linear_shape& s = args.shape;
  if (args.overlap != 0 && args.overlap != 1) {
    return fail(status, MMM_INVALID_ARGUMENT, "overlap is %d; wanted 0 or 1", args.overlap);
  }
  if (args.variant < 0) return fail(status, MMM_INVALID_ARGUMENT, "variant is %d; wanted 0 or more", args.variant);
  if (s.tokens == 0) return MMM_OK;  // nothing is read or written, so any pointer will do
  if (s.tokens > 1 && args.x_stride < s.inputs) {
    return fail(status, MMM_INVALID_ARGUMENT, "x_stride is %" PRId64 "; wanted at least %d, the inputs of a row", args.x_stride,
                s.inputs);
  }
  if (s.device == MMM_CUDA && s.tokens > 1 && args.x_stride % 8 != 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "x_stride is %" PRId64 "; wanted a multiple of 8 elements on CUDA", args.x_stride);
  }
  const int64_t io = element_bytes(s.io_dtype), M = s.tokens, N = s.outputs;
  int64_t x_bytes = M - 1;
  if (!grow(x_bytes, s.tokens > 1 ? args.x_stride : 0) || __builtin_add_overflow(x_bytes, s.inputs, &x_bytes) ||
      !grow(x_bytes, io)) {
    return fail(status, MMM_UNSUPPORTED, "%d tokens with stride %" PRId64 " span more than 2^63 bytes", s.tokens, args.x_stride);
  }
  const Region inputs[] = {
      {"x", args.x, x_bytes, 16},
      {"weight", args.weight, weight_bytes(s), 16},
      {"scales", args.scales, scale_bytes(s), 16},
      {"norm_weight", args.norm_weight, s.normalise ? s.inputs * io : 0, 16},
      {"kept_weight", args.kept_weight, int64_t{s.kept} * s.inputs * io, 16},
      {"residual", args.residual, s.epilogue == MMM_EPILOGUE_RESIDUAL ? M * N * io : 0, 16},
  };
  const Region outputs[] = {
      {"out", args.out, M * linear_columns(s) * element_bytes(s.out_dtype), 16},
      {"workspace", args.workspace, static_cast<int64_t>(workspace_bytes), 256},
  };
  if (args.workspace_bytes < workspace_bytes) {
    return fail(status, MMM_WORKSPACE_TOO_SMALL, "workspace_bytes is %" PRIu64 "; wanted at least %" PRIu64,
                args.workspace_bytes, workspace_bytes);
  }
  for (const Region& region : inputs) {
    if (const int32_t code = check_region(region, status)) return code;
  }
  for (const Region& region : outputs) {
    if (const int32_t code = check_region(region, status)) return code;
    for (const Region& input : inputs) {
      if (!overlap(region, input)) continue;
      const bool same = &region == &outputs[0] && &input == &inputs[5] && region.bytes == input.bytes;
      if (same && region.data == input.data) continue;  // updates in place
      return overlap_refused(region, input, "separate memory", status);
    }
  }
  if (overlap(outputs[0], outputs[1])) return overlap_refused(outputs[1], outputs[0], "separate memory", status);
  return MMM_OK;
}

}  // namespace mmm
