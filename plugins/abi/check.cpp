#include "abi/check.h"

#include <cinttypes>
#include <cmath>

#include "abi/backend.h"
#include "abi/region.h"

namespace mmm {
namespace {

// Bytes of the largest arrays of a call must fit an int64. Those left out are smaller than one of these.
bool sizes_fit(const mmm_scan_shape& s) {
  int64_t rows = element_bytes(MMM_FLOAT64), states = rows, conv = rows;
  return grow(rows, s.batch) && grow(rows, s.tokens) && grow(rows, row_width(s)) && grow(states, s.batch) &&
         grow(states, int64_t{s.heads} * s.head_dim) && grow(states, s.state_dim) && grow(conv, s.batch) &&
         grow(conv, conv_channels(s)) && grow(conv, s.conv_width);
}

int32_t check_width(const char* field, int32_t value, mmm_status& status) {
  if (value < 16 || value > 128 || value % 16 != 0) {
    return fail(status, value < 1 ? MMM_INVALID_ARGUMENT : MMM_UNSUPPORTED,
                "%s %d has no kernel; built for 16, 32, 48, 64, 80, 96, 112, 128", field, value);
  }
  return MMM_OK;
}

int32_t check_method(const mmm_scan_shape& s, mmm_status& status) {
  switch (s.method) {
    case MMM_AUTO:
    case MMM_SEQUENTIAL: return MMM_OK;
    case MMM_STEP:
      if (s.tokens != 1) {
        return fail(status, MMM_INVALID_ARGUMENT, "method is MMM_STEP, which takes one token; tokens is %d", s.tokens);
      }
      return MMM_OK;
    case MMM_CHUNKED: break;
    default:
      return fail(status, MMM_INVALID_ARGUMENT,
                  "method is %d, which is no mmm_method; wanted 0 (MMM_AUTO), 1 (MMM_STEP), 2 (MMM_CHUNKED) or "
                  "3 (MMM_SEQUENTIAL)",
                  s.method);
  }
  if (s.device == MMM_CPU) {
    return fail(status, MMM_UNSUPPORTED,
                "method is MMM_CHUNKED, which runs on CUDA only; on the CPU: MMM_AUTO, MMM_STEP, MMM_SEQUENTIAL");
  }
  if (s.io_dtype != MMM_FLOAT16 && s.io_dtype != MMM_BFLOAT16) {
    return fail(status, MMM_UNSUPPORTED, "method MMM_CHUNKED has no kernel for io_dtype %s; built for float16, bfloat16",
                dtype_name(s.io_dtype));
  }
  if (s.head_dim != s.state_dim || (s.head_dim != 64 && s.head_dim != 128)) {
    return fail(status, MMM_UNSUPPORTED,
                "method MMM_CHUNKED has no kernel for head_dim x state_dim %dx%d; built for 64x64, 128x128", s.head_dim,
                s.state_dim);
  }
  return MMM_OK;
}

int32_t check_strides(const mmm_scan_args& args, mmm_status& status) {
  const mmm_scan_shape& s = args.shape;
  const int64_t width = row_width(s), token = args.projected_token_stride, batch = args.projected_batch_stride;
  if (s.tokens > 1 && token < width) {
    return fail(status, MMM_INVALID_ARGUMENT,
                "projected_token_stride is %" PRId64 "; wanted at least %" PRId64 ", the width of a row", token, width);
  }
  if (s.batch > 1 && batch < 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "projected_batch_stride is %" PRId64 "; wanted 0 or more", batch);
  }
  return MMM_OK;
}

// Bytes from the first to the last element of projected; false when they fit no int64.
bool projected_span(const mmm_scan_args& args, int64_t& bytes) {
  const mmm_scan_shape& s = args.shape;
  bytes = 0;
  if (s.batch == 0 || s.tokens == 0) return true;
  int64_t batches = s.batch - 1, tokens = s.tokens - 1;
  // With one row or one token the stride means nothing and may hold any number.
  return grow(batches, s.batch > 1 ? args.projected_batch_stride : 0) &&
         grow(tokens, s.tokens > 1 ? args.projected_token_stride : 0) &&
         !__builtin_add_overflow(batches, tokens, &bytes) && !__builtin_add_overflow(bytes, row_width(s), &bytes) &&
         grow(bytes, element_bytes(s.io_dtype));
}

}  // namespace

int32_t check_shape(const mmm_scan_shape& s, mmm_status& status) {
  if (s.abi_version != MMM_ABI_VERSION) {
    return fail(status, MMM_INVALID_ARGUMENT, "abi_version is %d; this library was built with %d", s.abi_version,
                MMM_ABI_VERSION);
  }
  if (s.device != MMM_CPU && s.device != MMM_CUDA) {
    return fail(status, MMM_INVALID_ARGUMENT, "device is %d; wanted 0 (CPU) or 1 (CUDA)", s.device);
  }
  if (const int32_t code = check_dtype("io_dtype", s.io_dtype, s.device, status)) return code;
  if (const int32_t code = check_dtype("state_dtype", s.state_dtype, s.device, status)) return code;
  if (s.batch < 0) return fail(status, MMM_INVALID_ARGUMENT, "batch is %d; wanted 0 or more", s.batch);
  if (s.tokens < 0) return fail(status, MMM_INVALID_ARGUMENT, "tokens is %d; wanted 0 or more", s.tokens);
  if (s.kv_heads < 1) return fail(status, MMM_INVALID_ARGUMENT, "kv_heads is %d; wanted 1 or more", s.kv_heads);
  if (s.heads < 1 || s.heads % s.kv_heads != 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "heads is %d; wanted a multiple of kv_heads, %d", s.heads, s.kv_heads);
  }
  if (const int32_t code = check_width("head_dim", s.head_dim, status)) return code;
  if (const int32_t code = check_width("state_dim", s.state_dim, status)) return code;
  if (s.conv_width < 2 || s.conv_width > 4) {
    return fail(status, s.conv_width < 1 ? MMM_INVALID_ARGUMENT : MMM_UNSUPPORTED,
                "conv_width %d has no kernel; built for 2, 3, 4", s.conv_width);
  }
  if (!(s.eps > 0) || !std::isfinite(s.eps)) {
    return fail(status, MMM_INVALID_ARGUMENT, "eps is %g; wanted a finite number above 0", static_cast<double>(s.eps));
  }
  if (row_width(s) > INT32_MAX) {
    return fail(status, MMM_UNSUPPORTED, "a projected row of heads %d and kv_heads %d has %" PRId64 " elements; at most %d",
                s.heads, s.kv_heads, row_width(s), INT32_MAX);
  }
  if (!sizes_fit(s)) {
    return fail(status, MMM_UNSUPPORTED, "batch %d of %d tokens in rows of %" PRId64 " elements has more than 2^63 bytes",
                s.batch, s.tokens, row_width(s));
  }
  return check_method(s, status);
}

int32_t check_arguments(const mmm_scan_args& args, uint64_t workspace_bytes, mmm_status& status) {
  const mmm_scan_shape& s = args.shape;
  if (args.segments < 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "segments is %d; wanted 0 (chosen by the device) or more", args.segments);
  }
  if (args.overlap != 0 && args.overlap != 1) {
    return fail(status, MMM_INVALID_ARGUMENT, "overlap is %d; wanted 0 or 1", args.overlap);
  }
  if (s.batch == 0) return MMM_OK;  // nothing is read or written, so any pointer will do
  if (const int32_t code = check_strides(args, status)) return code;
  int64_t projected_bytes;
  if (!projected_span(args, projected_bytes)) {
    return fail(status, MMM_UNSUPPORTED,
                "projected with batch stride %" PRId64 " and token stride %" PRId64 " spans more than 2^63 bytes",
                args.projected_batch_stride, args.projected_token_stride);
  }

  const int64_t io = element_bytes(s.io_dtype), state = element_bytes(s.state_dtype), f32 = sizeof(float);
  const int64_t B = s.batch, C = conv_channels(s), HP = int64_t{s.heads} * s.head_dim;
  const int64_t conv_bytes = B * C * (s.conv_width - 1) * io, state_bytes = B * HP * s.state_dim * state;
  const Region inputs[] = {
      {"projected", args.projected, projected_bytes, 16},
      {"conv_state", args.conv_state, conv_bytes, io},
      {"ssm_state", args.ssm_state, state_bytes, 16},
      {"conv_weight", args.conv_weight, C * s.conv_width * f32, f32},
      {"conv_bias", args.conv_bias, C * f32, f32},
      {"dt_bias", args.dt_bias, s.heads * f32, f32},
      {"A_log", args.A_log, s.heads * f32, f32},
      {"norm_weight", args.norm_weight, s.head_dim * f32, f32},
      {"lengths", args.lengths, args.lengths != nullptr ? B * f32 : 0, f32},
  };
  const Region outputs[] = {
      {"y", args.y, B * s.tokens * HP * io, 16},
      {"conv_state_out", args.conv_state_out, conv_bytes, io},
      {"ssm_state_out", args.ssm_state_out, state_bytes, 16},
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
  }
  for (const Region& output : outputs) {
    for (const Region& other : outputs) {
      if (&other < &output && overlap(other, output)) return overlap_refused(output, other, "separate memory", status);
    }
    for (const Region& input : inputs) {
      if (!overlap(output, input)) continue;
      const bool both_ssm = &output == &outputs[2] && &input == &inputs[2];
      if (both_ssm && output.data == input.data) continue;  // updates in place
      return overlap_refused(output, input, both_ssm ? "the same address or separate memory" : "separate memory", status);
    }
  }
  return MMM_OK;
}

}  // namespace mmm
