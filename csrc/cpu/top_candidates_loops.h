// SPDX-License-Identifier: Apache-2.0
// The candidates of a chunk of logits (see top_candidates.cpp). Each file for one instruction set
// includes this with its namespace. Few logits pass the comparison with the smallest of the k best,
// which a vectorizer does sixteen at a time.
#pragma once
#include <limits>

#include "common/order.h"
#include "cpu/top_candidates.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

void insert(float value, int64_t id, Candidates& best) {
  const uint64_t key = descending_key(value, uint32_t(id));
  if (best.count == best.k) {
    if (key > best.key[best.k - 1]) return;
    --best.count;
  }
  int64_t at = best.count++;
  for (; at > 0 && best.key[at - 1] > key; --at) {
    best.key[at] = best.key[at - 1];
    best.value[at] = best.value[at - 1];
  }
  best.key[at] = key;
  best.value[at] = value;
  if (best.count == best.k && best.value[best.k - 1] > best.least)
    best.least = best.value[best.k - 1];
}

}  // namespace

void add_candidates(const float* z, int64_t first, Candidates& best) {
  constexpr int kTogether = 16;
  for (int i = 0; i < kRaceChunk; i += kTogether) {
    uint32_t any = 0;
    for (int l = 0; l < kTogether; ++l) any |= uint32_t(z[i + l] >= best.least);
    if (!any) continue;
    for (int l = 0; l < kTogether; ++l) {
      const float x = z[i + l];
      if (x >= best.least && x > -std::numeric_limits<float>::infinity())
        insert(x + 0.0f, first + i + l, best);  // -0 becomes 0
    }
  }
}

}  // namespace dlm::cpu::DLM_NAMESPACE
