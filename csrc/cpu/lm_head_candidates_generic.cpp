// SPDX-License-Identifier: Apache-2.0
// Merges sorted lists: each step takes the best of the lists' heads.
#include <limits>

#include "cpu/lm_head_candidates.h"

namespace dlm::cpu::generic {

void merge_candidates(const Candidates* of_share, int64_t count, int64_t stride, int64_t k,
                      int64_t* ids, float* values) {
  int64_t taken[kMostHeadShares] = {};
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t s = 0; s < count; ++s) {
      const Candidates& own = of_share[s * stride];
      if (taken[s] == own.count) continue;
      if (best < 0 || own.key[taken[s]] < of_share[best * stride].key[taken[best]]) best = s;
    }
    ids[i] = best < 0 ? -1 : int64_t(uint32_t(of_share[best * stride].key[taken[best]]));
    values[i] = best < 0 ? -std::numeric_limits<float>::infinity()
                         : of_share[best * stride].value[taken[best]];
    if (best >= 0) ++taken[best];
  }
}

}  // namespace dlm::cpu::generic
