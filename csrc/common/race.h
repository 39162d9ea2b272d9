// SPDX-License-Identifier: Apache-2.0
// A race in two levels: a draw from a distribution over a vocabulary that needs one random number
// for each chunk of 256 tokens, and one for each token of the chunk that wins, instead of one for
// every token. A chunk wins with its share of the whole weight, a token with its share of the
// chunk's, so the draw is exact. (Exponential races: Maddison, Tarlow and Minka, "A* sampling",
// NeurIPS 2014.)
//
// The sums of the chunks decide who wins, so their bits are part of the specification: weights are
// relative to the chunk's own largest logit, exponentials consist of single operations, and a sum
// is one tree. They depend on nothing outside the chunk: not on the vocabulary's padding, the
// number of threads or the device. reference/race.py restates all of it in torch.
#pragma once
#include "common/math.h"
#include "common/philox.h"

namespace dlm {

// Token v is in chunk v / kRaceChunk. Tokens beyond the vocabulary and those that are not to be
// drawn weigh nothing.
constexpr int kRaceChunk = 256;

// log2(e) in two floats.
constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;

// e^x for x <= 0, 0 below kExpUnderflow (and for -inf); 1 at 0. x log2(e) = n + f with |f| <= 1/2,
// and 2^f by a polynomial of least largest relative error.
DLM_HD float chunk_exp(float x) {
  const bool normal = x >= kExpUnderflow;
  const float clamped = keep_if(normal, x);
  const float shifted = fma_rn(clamped, kLog2E, 12582912.0f);  // 1.5 * 2^23: n in the lowest bits
  const float n = add_rn(shifted, -12582912.0f);
  float f = fma_rn(clamped, kLog2E, -n);
  f = fma_rn(clamped, kLog2ERest, f);
  float p = 1.3264591e-3f;
  p = fma_rn(p, f, 9.671619e-3f);
  p = fma_rn(p, f, 5.550735e-2f);
  p = fma_rn(p, f, 2.4022241e-1f);
  p = fma_rn(p, f, 6.93147e-1f);
  p = fma_rn(p, f, 1.0f);
  return keep_if(normal, bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23)));
}

// The sum of a chunk: halves are added to each other, element i to i + 128, then i to i + 64, and
// so on. Vectors of 8 and 16 elements, and warps whose lanes hold runs of a power of two, all add
// in this order without moving elements until the last few. Overwrites the first half.
DLM_HD float chunk_sum(float* weight) {
  for (int half = kRaceChunk / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) weight[i] = add_rn(weight[i], weight[i + half]);
  }
  return weight[0];
}

// The chunk with the largest key wins, the first of those that share it. `largest`: its largest
// logit, over the temperature; `sum`: of chunk_exp of its logits, over the temperature, less
// `largest`; r: word `chunk` of Stream::kChunk.
DLM_HD float chunk_key(float largest, float sum, uint32_t r) {
  return add_rn(add_rn(largest, plain_log(sum)), gumbel(r));
}

// The token with the largest key wins its chunk, the first of those that share it. `x`: its logit
// over the temperature; r: word `token` of Stream::kToken.
DLM_HD float token_key(float x, uint32_t r) { return add_rn(x, gumbel(r)); }

}  // namespace dlm
