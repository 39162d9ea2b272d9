// SPDX-License-Identifier: Apache-2.0
// Top-p sums probabilities relative to the largest as integers, so that a sum has the same bits in
// any order.
#pragma once
#include "common/exact.h"

namespace dlm {

// Units of the largest probability. (A vocabulary has fewer than 2^21 tokens, so their sum fits in
// 64 bits.)
constexpr float kMassUnits = 4398046511104.0f;  // 2^42

// Integer mass of e^x for x <= 0, rounded to nearest even. On a CPU this uses an addition, since
// few processors can convert to 64-bit integers.
DLM_HD uint64_t mass_of(float weight) {
  const float units = mul_rn(weight, kMassUnits);
#if defined(__CUDA_ARCH__)
  return uint64_t(__float2ll_rn(units));
#else
  return double_to_bits(double(units) + 6755399441055744.0) - 0x4338000000000000u;  // 1.5 * 2^52
#endif
}

}  // namespace dlm
