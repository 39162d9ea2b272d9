// SPDX-License-Identifier: Apache-2.0
// The sums over a shard's chunks, as digits. Takes about 100 scalar operations per chunk of 256
// logits.
#include "common/shard.h"
#include "cpu/shard_confidence.h"

namespace dlm::cpu::generic {

void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words) {
  const ShardSums shard(words, max, scale);
  for (int64_t c = begin; c < end; ++c) {
    if (!(sums.largest[c] > -std::numeric_limits<float>::infinity())) continue;
    shard.add(sums.largest[c], sums.weight[c], sums.exponent ? sums.exponent[c] : 0.0f);
  }
}

}  // namespace dlm::cpu::generic
