// What the checks of all operators share: arrays of a call, sizes that fit, types by name.
#ifndef MMM_ABI_REGION_H
#define MMM_ABI_REGION_H

#include <cstdint>

#include "mmm/kernels.h"

namespace mmm {

const char* dtype_name(int32_t dtype);

// An array of a call: where it lies, how many bytes it spans, what its address must be a multiple of.
struct Region {
  const char* name;
  const void* data;
  int64_t bytes;
  int64_t alignment;

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  uintptr_t end() const { return begin() + static_cast<uintptr_t>(bytes); }
  bool present() const { return data != nullptr && bytes > 0; }
};

inline bool overlap(const Region& a, const Region& b) {
  return a.present() && b.present() && a.begin() < b.end() && b.begin() < a.end();
}

// Multiply `total` by `factor` (both >= 0); false when the product fits no int64.
inline bool grow(int64_t& total, int64_t factor) { return !__builtin_mul_overflow(total, factor, &total); }

// Refuse a number that is no mmm_dtype, and float64 on CUDA.
int32_t check_dtype(const char* field, int32_t dtype, int32_t device, mmm_status& status);

// Refuse an array that is missing, badly aligned, or runs past the end of memory.
int32_t check_region(const Region& region, mmm_status& status);

int32_t overlap_refused(const Region& output, const Region& other, const char* wanted, mmm_status& status);

}  // namespace mmm

#endif
