// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/philox.h"

namespace dlm::cpu {

// The words of n consecutive Philox counters in the order of their indices, written for
// vectorizers. Internal to each including file, since each has its own compiler flags.
template <int n>
static inline void random_words(uint64_t seed, uint32_t position, uint32_t step, Stream stream,
                                uint32_t index4, uint32_t* word) {
  uint32_t c0[n], c1[n], c2[n], c3[n];
  for (int i = 0; i < n; ++i) {
    c0[i] = position;
    c1[i] = step;
    c2[i] = uint32_t(stream);
    c3[i] = index4 + uint32_t(i);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < n; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < n; ++i) {
    word[4 * i] = c0[i];
    word[4 * i + 1] = c1[i];
    word[4 * i + 2] = c2[i];
    word[4 * i + 3] = c3[i];
  }
}

}  // namespace dlm::cpu
