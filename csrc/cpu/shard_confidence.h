// SPDX-License-Identifier: Apache-2.0
// What a shard of the vocabulary says of a row (common/shard.h). All but the sums over its chunks
// is what token_confidence does for whole rows (token_confidence_rows.h).
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// Adds chunks [begin, end) to the sums in a row's words. `max`: the shard's largest logit, `scale`:
// 1 / T. Without exponents these count as zero.
void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words);

namespace generic {
void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words);
}  // namespace generic

}  // namespace dlm::cpu
