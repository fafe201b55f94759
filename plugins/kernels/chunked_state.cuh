// Two neighbouring entries of an SSM state, whatever type it is kept in.
#pragma once

#include <stdint.h>

#include "matrix.cuh"
#include "mmm/kernels.h"

namespace mmm {

__device__ __forceinline__ float2 load_state(const void* state, int dtype, int64_t index) {
  if (dtype == MMM_FLOAT32) return *reinterpret_cast<const float2*>(static_cast<const float*>(state) + index);
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(state) + index);
  return dtype == MMM_FLOAT16 ? Matrix<__half>::unpack(pair) : Matrix<__nv_bfloat16>::unpack(pair);
}

__device__ __forceinline__ void store_state(void* state, int dtype, int64_t index, float low, float high) {
  if (dtype == MMM_FLOAT32)
    *reinterpret_cast<float2*>(static_cast<float*>(state) + index) = make_float2(low, high);
  else
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(state) + index) =
        dtype == MMM_FLOAT16 ? Matrix<__half>::pack(low, high) : Matrix<__nv_bfloat16>::pack(low, high);
}

}  // namespace mmm
