// SPDX-License-Identifier: Apache-2.0
// Top-p adds up probabilities relative to the largest as whole numbers, so that a sum has the same
// bits in any order.
#pragma once
#include "common/exact.h"

namespace dlm {

// Of the largest. (A vocabulary has fewer than 2^21 words: their sum fits 64 bits.)
constexpr float kMassUnits = 4398046511104.0f;  // 2^42

// Of e^x for x <= 0: rounded to nearest, even. On a CPU by a sum, since few processors convert to
// integers of 64 bits.
DLM_HD uint64_t mass_of(float weight) {
  const float units = mul_rn(weight, kMassUnits);
#if defined(__CUDA_ARCH__)
  return uint64_t(__float2ll_rn(units));
#else
  return double_to_bits(double(units) + 6755399441055744.0) - 0x4338000000000000u;  // 1.5 * 2^52
#endif
}

}  // namespace dlm
