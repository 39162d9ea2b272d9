// SPDX-License-Identifier: Apache-2.0
// Scans of token_confidence (see token_confidence.cpp) with AVX-512F, BW, DQ and VL: 16 logits an
// instruction. A block is converted to float on the stack (4 KiB, in L1); one loop over it finds
// the maximum, another adds e^(z - max).
// Operations for 16 logits: 2 to convert, 1 (2 with the margin) for the maximum, 15 for the
// exponential and its sum (17 with temperature and entropy), on two (Intel) to four (AMD) vector
// units. These are the limit, not the bytes of the logits, while they come from a cache. A draw
// adds one key for each 256 logits, and the noise of 256 (common/race.h).
#include <algorithm>
#include <cmath>

#include "common/math.h"
#include "common/order.h"
#include "common/race.h"
#include "cpu/simd_avx512.h"
#include "cpu/token_confidence.h"

namespace dlm::cpu::avx512 {
namespace {

constexpr int kBlock = 1024;
constexpr int kChunk = 4 * kWidth;  // what one turn of the loops takes
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// --- maxima ------------------------------------------------------------------------------------

// The largest value, and the second largest, equal to it where it occurs twice.
struct TopTwo {
  float first, second;
};

// Finds them, looking past NaN: see what min and max do with it. `add` is told which of four
// independent chains to lengthen.
class Nothing {
 public:
  DLM_SIMD void add(int, Floats) {}
};
class Largest {
 public:
  DLM_SIMD void add(int j, Floats x) { first_[j] = max(x, first_[j]); }
  TopTwo result() const {
    return {largest(max(max(first_[0], first_[1]), max(first_[2], first_[3]))), -kInfinity};
  }

 private:
  Floats first_[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
};
class LargestTwo {
 public:
  DLM_SIMD void add(int j, Floats x) {
    second_[j] = max(min(first_[j], x), second_[j]);
    first_[j] = max(x, first_[j]);
  }
  TopTwo result() {
    for (int width = 2; width; width /= 2) {
      for (int j = 0; j < width; ++j) {
        const Floats lower = min(first_[j], first_[j + width]);
        first_[j] = max(first_[j], first_[j + width]);
        second_[j] = max(lower, max(second_[j], second_[j + width]));
      }
    }
    const float top = largest(first_[0]);
    const uint32_t holders = equal(first_[0], splat(top));
    const Mask others = Mask(~(holders & (~holders + 1)));  // all elements but one that holds it
    return {top, std::max(largest(second_[0]), largest(select(others, first_[0], second_[0])))};
  }

 private:
  Floats first_[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  Floats second_[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
};

template <class Top>
DLM_SIMD void add_all(const float* z, int n, Top& top) {
  for (int i = 0; i < n; i += kChunk) {
    for (int j = 0; j < 4; ++j) top.add(j, load(z + i + j * kWidth));
  }
}

template <class Top>
TopTwo top_of(const float* z, int n) {
  Top top;
  add_all(z, n, top);
  return top.result();
}

// --- one row -----------------------------------------------------------------------------------

// Logits as the rest of this file sees them: floats, guided, biased, without NaN and +inf, -inf
// where banned or below the floor.
template <class T>
class Row {
 public:
  explicit Row(const LogitsRow& row)
      : row_(row),
        logits_(static_cast<const T*>(row.logits)),
        uncond_(static_cast<const T*>(row.uncond)),
        plain_(!row.uncond && !row.bias && !row.bitmask && !(row.floor > -kInfinity)) {}

  // Writes logits [begin, min(begin + kBlock, end)), then -inf up to a multiple of kChunk, and
  // shows them to `top`; returns how many were written. There may be NaN and +inf among them
  // unless is_clean().
  template <class Top>
  int load(int64_t begin, int64_t end, float* z, Top& top) {
    using dlm::cpu::avx512::load;
    const int n = int(std::min<int64_t>(kBlock, end - begin));
    int i = 0;
    if (plain_ && n == kBlock) {
      Top seen;
      for (; i < kBlock; i += kChunk) {
        for (int j = 0; j < 4; ++j) {
          const Floats x = load(logits_ + begin + i + j * kWidth);
          store(z + i + j * kWidth, x);
          seen.add(j, x);
        }
      }
      if (!ban(begin, n, z)) {
        top = seen;
        return n;
      }
    } else {
      Specials specials;
      for (; i + kWidth <= n; i += kWidth) store(z + i, value(0xffff, begin + i, specials));
      if (i < n) {
        store(z + i, value(Mask((1u << (n - i)) - 1), begin + i, specials));
        i += kWidth;
      }
      flags |= specials.flags();
      for (; i % kChunk; i += kWidth) store(z + i, splat(-kInfinity));
      ban(begin, n, z);
    }
    add_all(z, i, top);
    return i;
  }

  bool is_clean() const { return !plain_; }
  void clean(float* z, int n) {
    if (is_clean()) return;
    Specials specials;
    for (int i = 0; i < n; i += kWidth)
      store(z + i, specials.replace(dlm::cpu::avx512::load(z + i)));
    flags |= specials.flags();
  }

  int32_t flags = 0;

 private:
  // True if any banned logit is among the n.
  bool ban(int64_t begin, int n, float* z) {
    bool any = false;
    for (int64_t i = 0; row_.banned && i < row_.banned_count; ++i) {
      const uint64_t at = uint64_t(row_.banned[i] - begin);
      if (at >= uint64_t(n)) continue;
      any = true;
      Specials specials;
      specials.replace(splat(z[at]));
      flags |= specials.flags();
      z[at] = -kInfinity;
    }
    return any;
  }

  // NaN becomes -inf, +inf the largest float; remembers both.
  struct Specials {
    Mask nan = 0, infinite = 0;
    // `there`: the lanes that hold logits. What guidance makes of the others may be NaN, too.
    DLM_SIMD Floats replace(Floats x, Mask there = 0xffff) {
      const Mask not_number = is_nan(x) & there, beyond = greater(x, splat(kLargest)) & there;
      nan |= not_number;
      infinite |= beyond;
      return select(beyond, splat(kLargest), select(not_number, splat(-kInfinity), x));
    }
    int32_t flags() const { return (nan ? kFlagNaN : 0) | (infinite ? kFlagPosInf : 0); }
  };

  // Logits at, at + 1 ... where the mask says so, -inf elsewhere.
  DLM_SIMD Floats value(Mask mask, int64_t at, Specials& specials) const {
    using dlm::cpu::avx512::load;
    Floats x = load(mask, logits_ + at);
    if (plain_) return select(mask, x, splat(-kInfinity));
    if (uncond_) {
      const Floats u = load(mask, uncond_ + at);
      x = u + splat(row_.guidance) * (x - u);
    }
    if (row_.bias) x = x + load(mask, row_.bias + at);
    x = specials.replace(x, mask);
    if (row_.bitmask) mask &= Mask(uint32_t(row_.bitmask[at / 32]) >> at % 32);
    return select(mask & at_least(x, splat(row_.floor)), x, splat(-kInfinity));
  }

  const LogitsRow& row_;
  const T* logits_;
  const T* uncond_;
  bool plain_;
};

int index_of(float value, const float* z) {
  int i = 0;
  for (;; i += kWidth) {
    const Mask found = equal(load(z + i), splat(value));
    if (found) return i + __builtin_ctz(found);
  }
}

// --- sums --------------------------------------------------------------------------------------

// 2^(j/16), less j in the bits that the exponential adds it to.
alignas(64) constexpr uint32_t kSixteenths[kWidth] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
// What rounding took from 2^(j/16), relative to it.
alignas(64) constexpr float kRoundedOff[kWidth] = {
    0.00000000e+00f,  4.62854715e-08f,  -1.19921575e-08f, 4.72978243e-08f,
    3.19341815e-08f,  3.62105723e-08f,  -3.09907193e-08f, -7.47521334e-09f,
    1.71142709e-08f,  -3.04768335e-08f, 5.23333421e-09f,  6.10759177e-09f,
    -1.47196051e-08f, -5.25879518e-09f, -6.12825968e-09f, 5.14060927e-09f};

struct ExpTables {
  Words sixteenths = load(kSixteenths);
  Floats rounded_off = load(kRoundedOff);
};

// e^x for x <= 0 where `normal` (x >= kExpUnderflow), else 0, within 0.6 units in the last place:
// with x log2(e) = n + f, n a multiple of 1/16 and |f| <= 1/32, 2^n by a table and the exponent,
// 2^f by a polynomial (least largest error, 1.6e-9).
DLM_SIMD Floats exponential(Floats x, Mask normal, const ExpTables& tables) {
  // adding 1.5 * 2^19 rounds to sixteenths, and leaves their number in the lowest bits
  const Floats shifted = fma(x, splat(1.44269502f), splat(786432.0f));
  const Floats n = shifted - splat(786432.0f);
  const Floats f = fma(x, splat(1.92596303e-8f), fms(x, splat(1.44269502f), n));
  const Words power = (bits(shifted) << 19) + look_up(bits(shifted), tables.sixteenths);
  Floats p = fma(f, splat(0.05550595f), splat(0.24023429f));
  p = fma(p, f, splat(0.69314718f));
  p = fma(p, f, look_up(bits(shifted), tables.rounded_off));
  return fma_or_zero(normal, from_bits(power), p, from_bits(power));
}

struct Terms {
  double weight = 0.0, weighted_exponent = 0.0;
};
// Sums of e^x and x e^x over n values, x = (z - max) * scale. Differences first: a product of its
// own could overflow. An element of the sums has at most 16 terms, added pairwise then.
template <bool kEntropy, bool kScaled>
Terms terms(const float* z, int n, float max, float scale) {
  const ExpTables tables;
  Floats weight[4], weighted[4];
  for (Floats& w : weight) w = splat(0.0f);
  for (Floats& w : weighted) w = splat(0.0f);
  for (int i = 0; i < n; i += kChunk) {
    for (int j = 0; j < 4; ++j) {
      Floats x = load(z + i + j * kWidth) - splat(max);
      if (kScaled) x = x * splat(scale);
      const Mask normal = not_less(x, splat(kExpUnderflow));  // NaN makes the sum NaN
      const Floats e = exponential(x, normal, tables);
      weight[j] = weight[j] + e;
      if (kEntropy) weighted[j] = fma_where(normal, e, x, weighted[j]);
    }
  }
  const auto total = [](const Floats* x) { return double(sum((x[0] + x[1]) + (x[2] + x[3]))); };
  return {total(weight), kEntropy ? total(weighted) : 0.0};
}

Terms terms(const float* z, int n, float max, const Wanted& want) {
  if (want.scale == 1.0f) {
    return want.entropy ? terms<true, false>(z, n, max, 1.0f)
                        : terms<false, false>(z, n, max, 1.0f);
  }
  return want.entropy ? terms<true, true>(z, n, max, want.scale)
                      : terms<false, true>(z, n, max, want.scale);
}

// --- the race of chunks (common/race.h) ------------------------------------------------------

// dlm::chunk_exp on 16 elements, to the bit.
DLM_SIMD Floats chunk_exp(Floats x) {
  const Mask normal = at_least(x, splat(kExpUnderflow));
  const Floats clamped = select(normal, x, splat(0.0f));
  const Floats shifted = fma(clamped, splat(kLog2E), splat(12582912.0f));
  const Floats n = shifted - splat(12582912.0f);
  const Floats f = fma(clamped, splat(kLog2ERest), fms(clamped, splat(kLog2E), n));
  Floats p = splat(kExp2C5);
  for (const float c : {kExp2C4, kExp2C3, kExp2C2, kExp2C1, 1.0f}) p = fma(p, f, splat(c));
  return select(normal, from_bits(bits(p) + (bits(shifted) << 23)), splat(0.0f));
}

// What a race and the statistics need of a chunk: its largest logit, and the sums of
// w = chunk_weight(z) and of (z - largest) / T w.
struct RaceChunkSums {
  float largest = -kInfinity, weight = 0.0f, exponent = 0.0f;
};
constexpr int kChunks = kBlock / kRaceChunk;  // of a block

// The sum of vectors n apart, in the order of dlm::chunk_sum.
template <int n>
DLM_SIMD Floats tree(const Floats* x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    Floats half[n / 2];
    for (int i = 0; i < n / 2; ++i) half[i] = x[i] + x[i + n / 2];
    return tree<n / 2>(half);
  }
}

// `largest` is the largest logit of the chunk, or one left out.
template <bool kExponents>
RaceChunkSums add_up(const float* z, float largest, float inverse) {
  constexpr int kVectors = kRaceChunk / kWidth;
  Floats weight[kVectors], exponent[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const Floats x = (load(z + i * kWidth) - splat(largest)) * splat(inverse);
    weight[i] = chunk_exp(x);
    if (kExponents) exponent[i] = weight[i] * max(x, splat(kExpUnderflow));
  }
  return {largest, sum(tree<kVectors>(weight)), kExponents ? sum(tree<kVectors>(exponent)) : 0.0f};
}

// The running race of chunks. Where the statistics are about the same temperature, its sums are
// theirs.
class Race {
 public:
  explicit Race(const Wanted& want)
      : want_(want),
        draw_(want.draw),
        is_shared_(want.sums && want.scale == want.draw.inverse_temperature) {}

  // Blocks come in ascending order, clean, with room for kBlock logits. n: a multiple of kChunk.
  void add(float* z, int n, int64_t begin) {
    for (int i = n; i % kRaceChunk; i += kWidth) store(z + i, splat(-kInfinity));
    const Philox4 random = philox(draw_.seed, draw_.position, draw_.step,
                                  redrawn(Stream::kChunk, draw_.redraw), uint32_t(begin / kBlock));
    const float inverse = draw_.inverse_temperature;
    for (int c = 0; c < kChunks; ++c) {
      chunk_[c] = {};
      const float* chunk = z + c * kRaceChunk;
      if (c * kRaceChunk >= n) continue;
      const float largest = top_of<Largest>(chunk, kRaceChunk).first;
      // No sum is above the number of tokens, no noise above 22.9: 0.1 covers all rounding.
      const float most = tempered(largest, inverse) + (5.6f + 22.9f + 0.1f);
      if (largest == -kInfinity || !(is_shared_ || most > key_)) continue;
      chunk_[c] = is_shared_ && want_.entropy ? add_up<true>(chunk, largest, inverse)
                                              : add_up<false>(chunk, largest, inverse);
      const float key = chunk_key(largest, inverse, chunk_[c].weight, random.word[c]);
      if (!(key > key_)) continue;
      key_ = key;
      winner_ = begin / kRaceChunk + c;
    }
  }

  bool is_shared() const { return is_shared_; }

  // The sums of the last block, relative to found.max; without its logit `at`, which has been made
  // -inf, if that is not negative.
  void add_to(Scan& found, const float* z, int at) {
    const float inverse = draw_.inverse_temperature;
    if (at >= 0) {
      const int c = at / kRaceChunk;
      const float* chunk = z + c * kRaceChunk;
      chunk_[c] = want_.entropy ? add_up<true>(chunk, chunk_[c].largest, inverse)
                                : add_up<false>(chunk, chunk_[c].largest, inverse);
    }
    for (const RaceChunkSums& chunk : chunk_) {
      if (chunk.largest == -kInfinity) continue;
      const float x = (chunk.largest - found.max) * inverse, factor = dlm::chunk_exp(x);
      if (factor == 0.0f) continue;
      found.weight += double(factor) * double(chunk.weight);
      found.weighted_exponent +=
          double(factor) * (double(chunk.exponent) + double(x) * double(chunk.weight));
    }
  }

  void finish(Scan& found) const {
    found.key = key_;
    found.chunk = winner_;
  }

 private:
  const Wanted& want_;
  const Draw& draw_;
  const bool is_shared_;
  RaceChunkSums chunk_[kChunks];
  float key_ = -kInfinity;
  int64_t winner_ = -1;
};

// --- the kernels -------------------------------------------------------------------------------

template <class T, class Top>
Scan scan_as(const LogitsRow& logits, int64_t begin, int64_t end, const Wanted& want) {
  Row<T> row(logits);
  Scan found;
  Race race(want);
  alignas(64) float z[kBlock];
  for (; begin < end; begin += kBlock) {
    Top all;
    const int n = row.load(begin, end, z, all);
    TopTwo top = all.result();
    // NaN among the others shows in the sums, where there are any; a race wants none
    if (!want.sums || want.sample || top.first == -kInfinity || top.first > kLargest) {
      row.clean(z, n);
      top = top_of<Top>(z, n);
    }
    if (top.first == -kInfinity) continue;
    if (want.sample) race.add(z, n, begin);
    int at = -1;
    if (top.first > found.max) {
      if (want.sums && found.argmax >= 0) {
        // from now on relative to the new maximum; the old one becomes an ordinary term
        const double exponent = (double(found.max) - double(top.first)) * double(want.scale),
                     factor = std::exp(exponent);
        found.weight += 1.0;
        found.weighted_exponent = factor * (found.weighted_exponent + exponent * found.weight);
        found.weight *= factor;
      }
      found.second = std::max(found.max, top.second);
      found.max = top.first;
      at = index_of(top.first, z);
      found.argmax = begin + at;
      z[at] = -kInfinity;
    } else {
      found.second = std::max(found.second, top.first);
    }
    if (want.sample && race.is_shared()) {
      race.add_to(found, z, at);
    } else if (want.sums) {
      Terms added = terms(z, n, found.max, want);
      if (added.weight != added.weight) {
        row.clean(z, n);
        added = terms(z, n, found.max, want);
      }
      found.weight += added.weight;
      found.weighted_exponent += added.weighted_exponent;
    }
  }
  found.flags = row.flags;
  race.finish(found);
  return found;
}

template <class T>
Scan scan_as(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want) {
  return want.second ? scan_as<T, LargestTwo>(row, begin, end, want)
                     : scan_as<T, Largest>(row, begin, end, want);
}

// dlm::exp_normal on 16 elements, to the bit: masses decide which tokens a filter keeps, on every
// processor the same.
DLM_SIMD Floats exp_normal(Floats x) {
  const Mask normal = at_least(x, splat(kExpUnderflow));
  const Floats clamped = select(normal, x, splat(0.0f));
  const Floats shifted = clamped * splat(1.44269504f) + splat(12582912.0f);
  const Floats n = shifted - splat(12582912.0f);
  Floats r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = (p * (r * r) + r) + splat(1.0f);
  const Floats power = from_bits((bits(shifted) << 23) + splat(0x3f800000u));
  return select(normal, p * power, splat(0.0f));
}

// dlm::ordered_bits
DLM_SIMD Words ordered_bits(Floats x) {
  const Words b = bits(x + splat(0.0f)), sign = splat(0u) - (b >> 31);
  return b ^ (sign | splat(0x80000000u));
}

template <class T>
void add_measures_as(const LogitsRow& logits, int64_t begin, int64_t end, const Measure& measure,
                     const Bins& bins) {
  Row<T> row(logits);
  alignas(64) float z[kBlock];
  // the logits of a block that fall into bins, moved together
  uint32_t bin[kBlock + kWidth];
  uint64_t units[kBlock + kWidth];
  Longs total = splat(uint64_t(0));
  const uint32_t span = bins.highest - bins.lowest, skipped = bins.lowest - bins.base;
  for (; begin < end; begin += kBlock) {
    Nothing none;
    const int n = row.load(begin, end, z, none);
    row.clean(z, n);
    int hits = 0;
    for (int i = 0; i < n; i += kWidth) {
      const Floats x = load(z + i);
      // A key less the lowest is at most the span, or the logit lies outside.
      const Words key = ordered_bits(x) - splat(bins.lowest);
      const Mask hit = at_most(key, splat(span));
      if (!hit && !bins.total) continue;
      const int count = __builtin_popcount(hit);
      if (measure.mass) {
        const Floats mass =
            exp_normal((x - splat(measure.max)) * splat(measure.scale)) * splat(kMassUnits);
        const Longs low = first_to_longs(mass), high = last_to_longs(mass);
        total = total + low + high;
        store(units + hits, compress(__mmask8(hit), low));
        store(units + hits + __builtin_popcount(hit & 0xff), compress(__mmask8(hit >> 8), high));
      }
      store(bin + hits, compress(hit, (key + splat(skipped)) >> bins.shift));
      hits += count;
    }
    for (int i = 0; i < hits; ++i) bins.sum[bin[i]] += measure.mass ? units[i] : 1;
  }
  if (bins.total) *bins.total += sum(total);
}

}  // namespace

Scan scan(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want) {
  switch (row.dtype) {
    case DType::kFloat32:
      return scan_as<float>(row, begin, end, want);
    case DType::kBFloat16:
      return scan_as<BFloat16>(row, begin, end, want);
    default:
      return scan_as<Float16>(row, begin, end, want);
  }
}

void add_measures(const LogitsRow& row, int64_t begin, int64_t end, const Measure& measure,
                  const Bins& bins) {
  switch (row.dtype) {
    case DType::kFloat32:
      return add_measures_as<float>(row, begin, end, measure, bins);
    case DType::kBFloat16:
      return add_measures_as<BFloat16>(row, begin, end, measure, bins);
    default:
      return add_measures_as<Float16>(row, begin, end, measure, bins);
  }
}

}  // namespace dlm::cpu::avx512
