// SPDX-License-Identifier: Apache-2.0
// The total order used throughout the library: value descending, then index ascending. Every back
// end compares with it, so ties are resolved the same way everywhere.
#pragma once
#include "common/dtype.h"

namespace dlm {

// Maps a float (never NaN) to an unsigned integer, preserving the order; -0 and +0 map to the same
// integer.
DLM_HD uint32_t ordered_bits(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DLM_HD float ordered_value(uint32_t ordered) {
  return bits_to_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// A key whose ascending order is value descending, then index ascending.
DLM_HD uint64_t descending_key(float value, uint32_t index) {
  return uint64_t(~ordered_bits(value)) << 32 | index;
}

}  // namespace dlm
