// SPDX-License-Identifier: Apache-2.0
// Elementary functions for inner loops. They are branch-free, so that a compiler can vectorize
// them, and consist of single IEEE-754 operations (contraction is off), so that they give the same
// bits on every processor.
#pragma once
#include "common/exact.h"

namespace dlm {

// Returns x or 0. Uses a mask, because compilers would turn ?: around a product into a branch.
DLM_HD float keep_if(bool condition, float x) {
  return bits_to_float(float_to_bits(x) & (0u - uint32_t(condition)));
}

// Arguments below this give 0: their exponentials are not normal floats.
constexpr float kExpUnderflow = -87.33654f;

// e^x for x <= 88 within 2 units in the last place, 0 below kExpUnderflow (and for -inf): Cephes'
// expf polynomial (Moshier) after x = n ln 2 + r, |r| <= ln(2) / 2.
DLM_HD float exp_normal(float x) {
  const bool normal = x >= kExpUnderflow;
  const float clamped = keep_if(normal, x);
  const float shifted =
      mul_add_rn(clamped, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: leaves n in the lowest bits
  const float n = add_rn(shifted, -12582912.0f);
  float r = mul_add_rn(n, -0.693359375f, clamped);
  r = mul_add_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = mul_add_rn(p, r, 1.3981999507e-3f);
  p = mul_add_rn(p, r, 8.3334519073e-3f);
  p = mul_add_rn(p, r, 4.1665795894e-2f);
  p = mul_add_rn(p, r, 1.6666665459e-1f);
  p = mul_add_rn(p, r, 5.0000001201e-1f);
  p = add_rn(mul_add_rn(p, mul_rn(r, r), r), 1.0f);
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return keep_if(normal, mul_rn(p, power));
}

// e^(z / T - logsumexp), given 1 / T: a probability of softmax(z / T). NaN and -inf give 0; +inf is
// treated as the largest float, as in token_confidence.
DLM_HD float tempered_probability(float z, float inverse, float logsumexp) {
  z = z > 3.402823466e+38f ? 3.402823466e+38f : z;
  const float x = add_rn(mul_rn(z, inverse), -logsumexp);
  return exp_normal(x > 0.0f ? 0.0f : x);
}

// Within 2 ulp for all floats; exp(-inf) = 0, exp(+inf) = +inf, NaN stays NaN; gradual underflow.
DLM_HD float plain_exp(float x) {
  // Beyond these bounds the result is 0 or +inf; a NaN fails both comparisons and passes through.
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum, so no rounding
  // instruction is needed.
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = (p * (f * f) + f) + 1.0f;
  // 2^n as two factors: a single one would leave the exponent range before the result does.
  const int32_t exponent = int32_t(float_to_bits(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float scale = bits_to_float(uint32_t(half + 127) << 23);
  const float rest = bits_to_float(uint32_t(exponent - half + 127) << 23);
  return (p * scale) * rest;
}

DLM_HD float plain_tanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = (p * z) * x + x;  // keeps the relative accuracy near zero
  const float far = 1.0f - 2.0f / (plain_exp(2.0f * (x < 0.0f ? -x : x)) + 1.0f);
  const float signed_far = x < 0.0f ? -far : far;
  return z < 0.390625f ? near : signed_far;
}

}  // namespace dlm
