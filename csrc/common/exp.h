// SPDX-License-Identifier: Apache-2.0
// exp and tanh of floats, branch-free so that loops over them vectorise; each operation rounds by
// itself, so the bits are the same everywhere. Polynomials: Cephes' expf and tanhf (Moshier).
#pragma once
#include "common/dtype.h"

namespace dlm {

// Within 2 ulp on all floats; exp(-inf) = 0, exp(+inf) = +inf, NaN stays NaN; gradual underflow.
DLM_HD float plain_exp(float x) {
  // Beyond these bounds the result is 0 or +inf; a NaN fails both comparisons and passes through.
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum: no rounding
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
  // 2^n in two factors: one alone would leave the exponent range before the result does.
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
  const float near = (p * z) * x + x;  // keeps the relative accuracy around zero
  const float far = 1.0f - 2.0f / (plain_exp(2.0f * (x < 0.0f ? -x : x)) + 1.0f);
  const float signed_far = x < 0.0f ? -far : far;
  return z < 0.390625f ? near : signed_far;
}

}  // namespace dlm
