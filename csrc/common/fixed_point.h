// SPDX-License-Identifier: Apache-2.0
// Non-negative costs as integers. Their sum is exact, so it has the same bits in any order and on
// every device.
#pragma once
#include "common/dtype.h"

namespace dlm {

// A cost is at most 2^20 and has 32 fractional bits. A running sum that stops at the first value
// above a budget (which is converted the same way) stays below 2^54.
constexpr float kMaxCost = 1048576.0f;

DLM_HD int64_t fixed_point(float cost, float if_nan) {
  if (cost != cost) cost = if_nan;
  cost = cost > 0.0f ? cost : 0.0f;
  cost = cost < kMaxCost ? cost : kMaxCost;
  return int64_t(double(cost) * 4294967296.0 + 0.5);  // product and sum are exact: rounds halves up
}

}  // namespace dlm
