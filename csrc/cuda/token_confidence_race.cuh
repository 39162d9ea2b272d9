// SPDX-License-Identifier: Apache-2.0
// The race of a row (common/race.h), where a warp holds a chunk of logits, eight per lane.
#pragma once
#include "common/order.h"
#include "cuda/chunk_sum.cuh"
#include "cuda/token_confidence_results.cuh"

namespace dlm::cuda {

// The random words of a row.
class RowRandom {
 public:
  DLM_DEVICE RowRandom(const TokenConfidenceParams& p, uint32_t n) : random_(p.random), n_(n) {}

  DLM_DEVICE uint32_t word(Stream stream, uint32_t index) const {
    return word_of(words(stream, index), index);
  }
  DLM_DEVICE Philox4 words(Stream stream, uint32_t index) const {
    const Stream own = redrawn(stream, uint32_t(row_value(random_.redraw, n_, 0)));
    return philox(uint64_t(row_value(random_.seed, n_, int64_t(0))), uint32_t(random_.position[n_]),
                  uint32_t(row_value(random_.step, n_, 0)), own, index / 4);
  }

 private:
  const RandomKey& random_;
  const uint32_t n_;
};

// The key of a chunk whose largest logit is `top`, as ordered bits, which are never 0.
template <bool two_runs>
DLM_DEVICE uint32_t exact_chunk_key(const float (&z)[8], float top, float inverse, uint32_t r) {
  float weight[8];
#pragma unroll
  for (uint32_t j = 0; j < 8; ++j) weight[j] = chunk_weight(z[j], top, inverse);
  return ordered_bits(chunk_key(top, inverse, chunk_sum_over_warp<two_runs>(weight), r));
}

// The token with the largest key of the winning chunk, which must contain one that can be drawn.
template <class Row>
DLM_DEVICE Drawn race_tokens(const float (&z)[8], uint32_t chunk, float inverse,
                             const RowRandom& random) {
  uint32_t best = 0, token = kNoToken;
  float logit = -INFINITY;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const Philox4 words = random.words(Stream::kToken, Row::id_of(chunk, 4 * half));
#pragma unroll
    for (uint32_t j = 4 * half; j < 4 * half + 4; ++j) {
      const uint32_t key = ordered_bits(token_key(z[j], inverse, words.word[j % 4]));
      if (!(z[j] > -INFINITY) || key <= best) continue;
      best = key;
      token = Row::id_of(chunk, j);
      logit = z[j];
    }
  }
  const uint32_t highest = __reduce_max_sync(kAllLanes, best);
  const uint32_t winner = __reduce_min_sync(kAllLanes, best == highest ? token : kNoToken);
  const uint32_t of_winner = winner == token ? ordered_bits(logit) : 0;
  return {winner, ordered_value(__reduce_max_sync(kAllLanes, of_winner)), 0};
}

}  // namespace dlm::cuda
