// What a quarter of a chunk of weights becomes in registers: 16 bytes as they lie in memory, to pairs of 16-bit elements that the
// matrix units take. Integers are exact in either type, so scales are applied to sums and never to weights.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "mmm/kernels.h"

namespace mmm {

// An integer n in the low bits of such a number is the number kBase + n: no conversion instruction is needed.
template <typename Element>
struct Magic;

template <>
struct Magic<__half> {
  static constexpr uint32_t kBits = 0x64006400u;  // kBase is 1024
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    const __half2 difference = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&difference);
  }
};

template <>
struct Magic<__nv_bfloat16> {
  static constexpr uint32_t kBits = 0x43004300u;  // kBase is 128
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    const __nv_bfloat162 difference = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&difference);
  }
};

// (bits & mask) | magic, in one instruction.
__device__ __forceinline__ uint32_t masked(uint32_t bits, uint32_t mask, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(magic));
  return result;
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A format: how many inputs 16 bytes hold, and in which order `expand` gives 8 of them, the order that x is brought into as well.
template <typename Element, int FORMAT>
struct Weights;

template <typename Element>
struct Weights<Element, MMM_WEIGHT_PLAIN> {
  static constexpr int kInputs = 8;  // of 16 bytes
  static __device__ __forceinline__ void expand(const uint4& v, int, uint32_t (&pairs)[4]) {
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
  }
  static __device__ __forceinline__ uint4 ordered(const uint4& x) { return x; }
};

template <typename Element>
struct Weights<Element, MMM_WEIGHT_INT8> {
  static constexpr int kInputs = 16;
  // Pairs of inputs (0, 2), (1, 3), (4, 6), (5, 7). A byte u is (u & 127) - (u & 128), and both terms are made by one mask.
  static __device__ __forceinline__ void expand(const uint4& v, int piece, uint32_t (&pairs)[4]) {
    constexpr uint32_t kBits = Magic<Element>::kBits;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = word_of(v, 2 * piece + i / 2), bytes = i % 2 ? word >> 8 : word;
      pairs[i] = Magic<Element>::subtract(masked(bytes, 0x007f007fu, kBits), masked(bytes, 0x00800080u, kBits));
    }
  }
  static __device__ __forceinline__ uint4 ordered(const uint4& x) {
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x5410),
                      __byte_perm(x.z, x.w, 0x7632));
  }
};

template <typename Element>
struct Weights<Element, MMM_WEIGHT_INT4> {
  static constexpr int kInputs = 32;
  // Pairs of inputs (0, 4), (1, 5), (2, 6), (3, 7).
  static __device__ __forceinline__ void expand(const uint4& v, int piece, uint32_t (&pairs)[4]) {
    expand_with_offset(v, piece, pairs);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = Magic<Element>::subtract(pairs[i], Magic<Element>::kBits | 0x00080008u);
  }
  // The same, each too large by Magic::kBase + 8.
  static __device__ __forceinline__ void expand_with_offset(const uint4& v, int piece, uint32_t (&pairs)[4]) {
    const uint32_t word = word_of(v, piece);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = masked(word >> (4 * i), 0x000f000fu, Magic<Element>::kBits);
  }
  static __device__ __forceinline__ uint4 ordered(const uint4& x) {
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                      __byte_perm(x.y, x.w, 0x7632));
  }
};

// A scale of INT4 as its 16 bits, and as a number.
__device__ __forceinline__ float scale_of(uint32_t bits, bool is_bfloat16) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return is_bfloat16 ? __uint_as_float(bits << 16) : half;
}

}  // namespace mmm
