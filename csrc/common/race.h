// SPDX-License-Identifier: Apache-2.0
// A two-level race: draws from a distribution over a vocabulary with one random number per chunk of
// 256 tokens, and one per token of the winning chunk, instead of one per token of the vocabulary. A
// chunk wins with probability equal to its share of the total weight, and a token with its share of
// the chunk's weight, so the draw is exact. (Exponential races: Maddison, Tarlow and Minka, "A*
// sampling", NeurIPS 2014.)
//
// The sums of the chunks decide which chunk wins, so their bits are part of the specification:
// weights are relative to the chunk's own largest logit, exponentials consist of single operations,
// and a sum is one fixed tree. They depend on nothing outside the chunk: not on the vocabulary's
// padding, the number of threads or the device. reference/race.py restates all of this in torch.
#pragma once
#include "common/math.h"
#include "common/philox.h"

namespace dlm {

// Token v is in chunk v / kRaceChunk. Tokens beyond the vocabulary and those that must not be drawn
// have weight 0.
constexpr int kRaceChunk = 256;

// log2(e) in two floats.
constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;

// 2^f for |f| <= 1/2: the minimax polynomial of degree 6 that is 1 at 0, with a relative error of
// at most 1.6e-8 after its coefficients are rounded.
constexpr float kExp2C1 = 6.93147182e-1f, kExp2C2 = 2.40226477e-1f, kExp2C3 = 5.55033237e-2f,
                kExp2C4 = 9.61843692e-3f, kExp2C5 = 1.33988739e-3f, kExp2C6 = 1.53533620e-4f;

// e^x for x <= 0, 0 below kExpUnderflow (and for -inf); 1 at 0. x log2(e) = n + f with |f| <= 1/2.
DLM_HD float chunk_exp(float x) {
  const bool normal = x >= kExpUnderflow;
  const float clamped = keep_if(normal, x);
  const float shifted = fma_rn(clamped, kLog2E, 12582912.0f);  // 1.5 * 2^23: n in the lowest bits
  const float n = add_rn(shifted, -12582912.0f);
  float f = fma_rn(clamped, kLog2E, -n);
  f = fma_rn(clamped, kLog2ERest, f);
  float p = kExp2C6;
  p = fma_rn(p, f, kExp2C5);
  p = fma_rn(p, f, kExp2C4);
  p = fma_rn(p, f, kExp2C3);
  p = fma_rn(p, f, kExp2C2);
  p = fma_rn(p, f, kExp2C1);
  p = fma_rn(p, f, 1.0f);
  return keep_if(normal, bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23)));
}

// The sum of a chunk: the two halves are added elementwise, element i to i + 128, then i to i + 64,
// and so on. Vectors of 8 or 16 elements, and warps whose lanes hold runs of a power of two, can
// add in this order without moving elements until the last few additions. Overwrites the first
// half.
DLM_HD float chunk_sum(float* weight) {
  for (int half = kRaceChunk / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) weight[i] = add_rn(weight[i], weight[i + half]);
  }
  return weight[0];
}

// A finite logit divided by the temperature; on overflow, the largest float of its sign.
DLM_HD float tempered(float z, float inverse_temperature) {
  const float x = mul_rn(z, inverse_temperature);
  return x > 3.402823466e+38f ? 3.402823466e+38f : x < -3.402823466e+38f ? -3.402823466e+38f : x;
}

// Weight of a logit in its chunk, whose largest logit has weight 1. The difference is taken before
// the product, because separate products would lose more precision for large logits.
DLM_HD float chunk_weight(float z, float largest, float inverse_temperature) {
  return chunk_exp(mul_rn(add_rn(z, -largest), inverse_temperature));
}

// The chunk with the largest key wins; of equal keys, the first. `sum` is the sum of its
// chunk_weight; r is word `chunk` of Stream::kChunk.
DLM_HD float chunk_key(float largest, float inverse_temperature, float sum, uint32_t r) {
  return add_rn(add_rn(tempered(largest, inverse_temperature), plain_log(sum)), gumbel(r));
}

// The token with the largest key wins its chunk; of equal keys, the first. r is word `token` of
// Stream::kToken.
DLM_HD float token_key(float z, float inverse_temperature, uint32_t r) {
  return add_rn(tempered(z, inverse_temperature), gumbel(r));
}

// Key for a race of weights instead of logits, with the streams kResidualChunk and kResidual.
// `weight` is that of a token, or the chunk_sum of a chunk.
DLM_HD float weight_key(float weight, uint32_t r) { return div_rn(weight, exponential(r)); }

}  // namespace dlm
