// float16 and bfloat16 as bit patterns, without compiler types for them (g++ 12 has none on every target). Rounding is to nearest,
// ties to even, as on a GPU. All selects are by value, so that loops over these functions vectorise.
#ifndef MMM_CPU_NUMBER_FORMATS_H
#define MMM_CPU_NUMBER_FORMATS_H

#include <cstdint>
#include <cstring>

namespace mmm {

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_bfloat16(uint16_t half) { return float_from_bits(uint32_t{half} << 16); }

inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into infinity
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline float float_from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = (half & 0x7fffu) << 13;  // float16's exponent and fraction at float32's places
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t special = magnitude | 0x7f800000u;
  // A subnormal is its fraction times 2^-24.
  const uint32_t subnormal = bits_from_float(static_cast<float>(static_cast<int32_t>(half & 0x3ffu)) * 0x1p-24f);
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return float_from_bits(sign | (magnitude >= (31u << 23) ? special : finite));
}

inline uint16_t float16_from_float(float value) {
  const uint32_t bits = bits_from_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t tie_to_even = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + tie_to_even) >> 13;  // may carry into infinity
  // Next to 0.5 the float32 grid is that of float16 subnormals (2^-24): the addition rounds for us.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
}

}  // namespace mmm

#endif
