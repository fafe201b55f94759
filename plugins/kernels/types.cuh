// Element types of rows and states: float32 in registers, whatever the caller chose in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "mmm/kernels.h"

namespace mmm {

template <typename Element>
struct ElementTraits;

template <>
struct ElementTraits<float> {
  static __device__ __forceinline__ float to_float(float x) { return x; }
  static __device__ __forceinline__ float from_float(float x) { return x; }
};

template <>
struct ElementTraits<__half> {
  static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct ElementTraits<__nv_bfloat16> {
  static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {  // a bfloat16 is the upper half of a float
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <typename Element>
__device__ __forceinline__ float to_float(Element x) {
  return ElementTraits<Element>::to_float(x);
}

template <typename Element>
__device__ __forceinline__ Element from_float(float x) {
  return ElementTraits<Element>::from_float(x);
}

// 16 bytes of elements as they lie in memory: 4 of float32, 8 of the 16-bit types. Registers hold them until they are used.
template <typename Element>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(Element);
  uint4 bits;

  __device__ __forceinline__ void unpack(float (&x)[kSize]) const {
    if constexpr (sizeof(Element) == 4) {
      x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
      x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
    } else {
      const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 pair = ElementTraits<Element>::unpack(word[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&x)[kSize]) {
    if constexpr (sizeof(Element) == 4) {
      bits = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    } else {
      bits = make_uint4(ElementTraits<Element>::pack(x[0], x[1]), ElementTraits<Element>::pack(x[2], x[3]),
                        ElementTraits<Element>::pack(x[4], x[5]), ElementTraits<Element>::pack(x[6], x[7]));
    }
  }

  // "Streaming": read once, written once, so that neither displaces in the caches what other kernels will want again.
  static __device__ __forceinline__ Vector16 load_streaming(const Element* address) {
    return {__ldcs(reinterpret_cast<const uint4*>(address))};
  }
  __device__ __forceinline__ void store_streaming(Element* address) const {
    __stcs(reinterpret_cast<uint4*>(address), bits);
  }
};

// A scalar of a type known only at run time, for what is read or written once in a kernel.
__device__ __forceinline__ float load_as_float(const void* elements, int dtype, int64_t index) {
  if (dtype == MMM_FLOAT32) return static_cast<const float*>(elements)[index];
  if (dtype == MMM_FLOAT16) return __half2float(static_cast<const __half*>(elements)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(elements)[index]);
}

__device__ __forceinline__ void store_from_float(void* elements, int dtype, int64_t index, float x) {
  if (dtype == MMM_FLOAT32) static_cast<float*>(elements)[index] = x;
  else if (dtype == MMM_FLOAT16) static_cast<__half*>(elements)[index] = __float2half_rn(x);
  else static_cast<__nv_bfloat16*>(elements)[index] = __float2bfloat16_rn(x);
}

}  // namespace mmm
