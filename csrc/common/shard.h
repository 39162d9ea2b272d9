// SPDX-License-Identifier: Apache-2.0
// Summary of a row over one shard of the vocabulary, such that combined results have the same bits
// however the vocabulary is divided. A shard holds tokens [first, first + V); first is a multiple
// of kRaceChunk, and so is V except in the last shard. Every chunk of the race (common/race.h)
// therefore lies in one shard, and the values of a chunk (its largest logit, the float sums of its
// weights) do not depend on the division. Only the sums over chunks would depend on the order of
// addition, so they are kept as integers.
//
// A chunk's share of the row's weight is w e^t, where t = z / T for its largest logit z, and w is
// the sum of its weights. That is a double times a power of two. Its 53 bits are added to 32-bit
// digits with absolute places, so sums of digits are exact in any order. The digits kept range from
// a little above the row's largest logit to 160 bits below it: whatever a shard drops relative to
// its own largest logit would also be dropped for the whole row.
//
// The chunk with the largest logit is not part of the sums: it is stored separately, both with its
// largest logit and without it, since the row's statistics are computed without the argmax, whose
// weight is 1.
#pragma once
#include "common/exact.h"
#include "common/race.h"

namespace dlm {

constexpr int64_t kWeightDigits = 7, kExponentDigits = 8;

// The 64-bit words of a row's partial result. Where a word holds two floats, the first is in the
// low bits.
enum ShardWord : int64_t {
  kShardArgmax,    // id in the whole vocabulary; -1: no token is allowed
  kShardToken,     // id of the drawn token; -1: none
  kShardFlags,     // kFlagNaN, kFlagPosInf, kFlagUnused
  kShardLargest,   // the largest and the second largest logit
  kShardWeight,    // sums of weights of the argmax's chunk: all of it; without the argmax
  kShardExponent,  // likewise the sums of x e^x, x = (z - largest) / T (for the entropy)
  kShardDrawn,     // key of the drawn token's chunk, and the token's logit
  kShardGiven,     // logit of the given token, and the integer 1 if it is in the shard
  kShardWeights,   // digits, highest first, of the sum of w e^t over the other chunks
  kShardExponents = kShardWeights + kWeightDigits,  // of the sum of (t w + e) e^t, e as above
  kShardWords = kShardExponents + kExponentDigits
};
constexpr int32_t kFlagUnused = 8;  // the row map holds -1

DLM_HD int64_t two_floats(float low, float high) {
  return int64_t(uint64_t(float_to_bits(low)) | uint64_t(float_to_bits(high)) << 32);
}
DLM_HD float low_float(int64_t word) { return bits_to_float(uint32_t(word)); }
DLM_HD float high_float(int64_t word) { return bits_to_float(uint32_t(uint64_t(word) >> 32)); }

// e^t for |t| < kFarExponent, as factor * 2^power with a factor in [0.7, 1.5). The relative error
// is 2^-52 plus the rounding error of t log2(e) as a double. Single operations: the same bits
// everywhere.
struct Power {
  double factor;
  int64_t power;
};
DLM_HD Power exact_exp(double t) {
  const double y = mul_rn(t, 1.4426950408889634);
  const int64_t n = int64_t(add_rn(y, y < 0.0 ? -0.5 : 0.5));
  const double x = mul_rn(add_rn(y, -double(n)), 0.6931471805599453);
  double p = 1.0;  // Taylor, |x| <= 0.35: x^13 / 13! is below 2^-52
  for (int i = 13; i > 0; --i) p = add_rn(mul_rn(mul_rn(p, x), 1.0 / i), 1.0);
  return {p, n};
}

// Beyond this bound, floats divided by the temperature are so far apart that only those equal to
// the largest count.
constexpr double kFarExponent = 4294967296.0;

// Digits of a sum: at[i] has the weight 2^(32 (top - i)).
template <int64_t kDigits>
struct DigitSum {
  int64_t* at;
  int64_t top;

  DLM_HD void put(int64_t digit, int64_t value) const {
    const int64_t i = top - digit;
    if (i >= 0 && i < kDigits) at[i] += value;
  }
  // Adds value * 2^power.
  DLM_HD void add(double value, int64_t power) const {
    const uint64_t bits = double_to_bits(value);
    const int64_t exponent = int64_t(bits >> 52 & 0x7ff);
    if (exponent == 0) return;
    const uint64_t mantissa = (bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
    const int64_t place = power + exponent - 1075, digit = place >> 5;
    const uint64_t low = (mantissa & 0xffffffffu) << (place & 31);
    const uint64_t high = ((mantissa >> 32) << (place & 31)) + (low >> 32);
    const int64_t sign = bits >> 63 ? -1 : 1;
    put(digit, sign * int64_t(low & 0xffffffffu));
    put(digit + 1, sign * int64_t(high & 0xffffffffu));
    put(digit + 2, sign * int64_t(high >> 32));
  }
  // Returns the sum divided by 2^power, which is close to the largest logit's.
  DLM_HD double over(int64_t power) const {
    double sum = 0.0;
    for (int64_t i = kDigits - 1; i >= 0; --i) {
      int64_t shift = 32 * (top - i) - power;  // at least -224, at most 96
      double scale = 1.0;
      for (; shift > 0; --shift) scale *= 2.0;
      for (; shift < 0; ++shift) scale *= 0.5;
      sum = add_rn(sum, mul_rn(double(at[i]), scale));
    }
    return sum;
  }
};

// The sums over chunks of a row whose largest logit is `largest`.
struct ShardSums {
  // `scale` is 1 / T, as a double, of the distribution that the statistics describe.
  DLM_HD ShardSums(int64_t* words, float largest, double scale)
      : largest(largest), scale(scale), is_far(is_far_from_zero(mul_rn(double(largest), scale))) {
    const Power e = exact_exp(exponent_of(largest));
    factor = e.factor, power = e.power;
    const int64_t digit = power >> 5;
    weights = {words + kShardWeights, digit + 1};
    exponents = {words + kShardExponents, digit + 2};
  }

  DLM_HD static bool is_far_from_zero(double t) { return !(t < kFarExponent && t > -kFarExponent); }
  // Returns z / T, or 0 if the row's largest is far from zero.
  DLM_HD double exponent_of(float z) const { return is_far ? 0.0 : mul_rn(double(z), scale); }
  // Whether logits up to z, which is at most the row's largest, are significant relative to it.
  DLM_HD bool counts(float z) const {
    return is_far ? z == largest : !is_far_from_zero(mul_rn(double(z), scale));
  }
  // Adds a chunk, given its largest logit and its sums.
  DLM_HD void add(float z, float weight, float exponent) const {
    if (!counts(z)) return;
    const double t = exponent_of(z);
    const Power e = exact_exp(t);
    weights.add(mul_rn(double(weight), e.factor), e.power);
    exponents.add(mul_rn(add_rn(mul_rn(t, double(weight)), double(exponent)), e.factor), e.power);
  }
  // Adds the sums of another shard, whose largest logit is z.
  DLM_HD void add_sums(const int64_t* words, float z) const {
    if (!counts(z)) return;
    const int64_t digit = exact_exp(exponent_of(z)).power >> 5;
    for (int64_t i = 0; i < kWeightDigits; ++i)
      weights.put(digit + 1 - i, words[kShardWeights + i]);
    for (int64_t i = 0; i < kExponentDigits; ++i)
      exponents.put(digit + 2 - i, words[kShardExponents + i]);
  }

  float largest;
  double scale;
  bool is_far;
  double factor;  // e^t of the largest logit
  int64_t power;
  DigitSum<kWeightDigits> weights;
  DigitSum<kExponentDigits> exponents;
};

}  // namespace dlm
