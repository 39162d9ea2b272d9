// SPDX-License-Identifier: Apache-2.0
#include "cpu/shard_confidence.h"

namespace dlm::cpu {

void add_shard_chunks(const ChunkSums& sums, int64_t begin, int64_t end, double scale, float max,
                      int64_t* words) {
  generic::add_shard_chunks(sums, begin, end, scale, max, words);
}

}  // namespace dlm::cpu
