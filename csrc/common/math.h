// SPDX-License-Identifier: Apache-2.0
// Elementary functions for inner loops: branch-free, so that a compiler can vectorise them, and of
// single IEEE-754 operations (contraction is off), so that they give the same bits on every
// processor.
#pragma once
#include "common/dtype.h"

namespace dlm {

// x, or 0: by a mask, where compilers would make a branch of ?: around a product.
DLM_HD float keep_if(bool condition, float x) {
  return bits_to_float(float_to_bits(x) & (0u - uint32_t(condition)));
}

// Arguments below this give 0: their exponentials are not normal floats.
constexpr float kExpUnderflow = -87.33654f;

// e^x for x <= 88 within 2 units in the last place, 0 below kExpUnderflow (and for -inf): Cephes'
// expf polynomial (Moshier) after x = n ln 2 + r, |r| <= ln(2) / 2.
DLM_HD float plain_exp(float x) {
  const bool normal = x >= kExpUnderflow;
  const float clamped = keep_if(normal, x);
  const float shifted =
      clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: n is left in the lowest bits
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return keep_if(normal, p * power);
}

}  // namespace dlm
