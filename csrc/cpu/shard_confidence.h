// SPDX-License-Identifier: Apache-2.0
// Summary of a row over a shard of the vocabulary (common/shard.h). Everything except the sums over
// its chunks is done by token_confidence as for whole rows (token_confidence_rows.h).
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// Adds chunks [begin, end) to the sums in a row's words. `max` is the shard's largest logit,
// `scale` is 1 / T. If there are no exponents, they count as zero.
void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words);

namespace generic {
void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words);
}  // namespace generic

}  // namespace dlm::cpu
