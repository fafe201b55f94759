// The scalar functions of the operator, for float and double.
#ifndef MMM_CPU_ACTIVATIONS_H
#define MMM_CPU_ACTIVATIONS_H

#include <cmath>
#include <cstdint>

#include "cpu/number_formats.h"

namespace mmm {

// log(1 + exp(x)) without overflow, and without the threshold above which some libraries return x.
template <typename Real>
inline Real softplus(Real x) {
  return (x > 0 ? x : Real(0)) + std::log1p(std::exp(-std::fabs(x)));
}

// exp(-|x|) to 2 units in the last place; where that would leave the normal numbers, and for NaN, exp(-87). Plain arithmetic, so that
// loops over it vectorise, which they do not over std::exp: a head needs one for each of its v, k, q and gate.
inline float exp_of_minus_magnitude(float x) {
  // The smaller one of two non-negative floats, as integers: a comparison of floats would become a branch.
  const int32_t magnitude = static_cast<int32_t>(bits_from_float(x) & 0x7fffffffu), limit = 0x42ae0000;  // 87
  const float z = -float_from_bits(static_cast<uint32_t>(magnitude < limit ? magnitude : limit));
  const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = z * 1.44269504f + round;
  const float n = shifted - round;
  const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two pieces, the first exact times n
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = bits_from_float(shifted) - bits_from_float(round) + 127u;
  return p * float_from_bits(exponent << 23);
}

// x / (1 + exp(-x)), in the form that cannot overflow: for x < 0 it is x e / (1 + e), else x / (1 + e), with e = exp(-|x|).
inline float silu(float x) {
  const float e = exp_of_minus_magnitude(x);
  const uint32_t negative = bits_from_float(x) >> 31 ? 0xffffffffu : 0u;
  const uint32_t factor = (bits_from_float(e) & negative) | (bits_from_float(1.0f) & ~negative);  // a select, not a branch
  return x * float_from_bits(factor) / (1.0f + e);
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

}  // namespace mmm

#endif
