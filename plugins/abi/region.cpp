#include "abi/region.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "abi/backend.h"

namespace mmm {

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case MMM_FLOAT32: return "float32";
    case MMM_FLOAT16: return "float16";
    case MMM_BFLOAT16: return "bfloat16";
    case MMM_FLOAT64: return "float64";
    default: return "unknown";
  }
}

int32_t check_dtype(const char* field, int32_t dtype, int32_t device, mmm_status& status) {
  if (element_bytes(dtype) == 0) {
    return fail(status, MMM_INVALID_ARGUMENT,
                "%s is %d, which is no mmm_dtype; wanted 0 (float32), 1 (float16), 2 (bfloat16) or 3 (float64)", field,
                dtype);
  }
  if (device == MMM_CUDA && dtype == MMM_FLOAT64) {
    return fail(status, MMM_UNSUPPORTED, "%s is float64, which runs on the CPU only; on CUDA: float32, float16, bfloat16",
                field);
  }
  return MMM_OK;
}

int32_t check_region(const Region& region, mmm_status& status) {
  if (region.bytes == 0) return MMM_OK;
  if (region.data == nullptr) {
    return fail(status, MMM_INVALID_ARGUMENT, "%s is NULL; wanted %" PRId64 " bytes", region.name, region.bytes);
  }
  if (region.begin() % static_cast<uintptr_t>(region.alignment) != 0) {
    return fail(status, MMM_INVALID_ARGUMENT, "%s is at %p; wanted an address that is a multiple of %" PRId64 " bytes",
                region.name, region.data, region.alignment);
  }
  if (region.end() < region.begin()) {
    return fail(status, MMM_INVALID_ARGUMENT, "%s is at %p; its %" PRId64 " bytes run past the end of memory",
                region.name, region.data, region.bytes);
  }
  return MMM_OK;
}

int32_t overlap_refused(const Region& output, const Region& other, const char* wanted, mmm_status& status) {
  return fail(status, MMM_INVALID_ARGUMENT, "%s (%" PRId64 " bytes at %p) overlaps %s (%" PRId64 " bytes at %p); wanted %s",
              output.name, output.bytes, output.data, other.name, other.bytes, other.data, wanted);
}

int32_t fail(mmm_status& status, mmm_code code, const char* format, ...) {
  status.code = code;
  va_list values;
  va_start(values, format);
  std::vsnprintf(status.text, sizeof status.text, format, values);
  va_end(values);
  return code;
}

}  // namespace mmm
