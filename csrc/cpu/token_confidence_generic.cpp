// SPDX-License-Identifier: Apache-2.0
// token = argmax z or argmax (z/T + Gumbel noise); its probability, and the statistics of
// softmax(z) or softmax(z/T), from one pass over a row of logits: a block is converted to float on
// the stack, and its terms join, for x_v = (z_v - max) / T and all v but the argmax,
//   S = sum of e^x_v,   X = sum of x_v e^x_v
// so that 1 - confidence = S / (1 + S) and entropy = log(1 + S) - X / (1 + S) keep their relative
// accuracy in peaked rows, where decisions fall. Sums are float over the lanes of a block and
// double over blocks, in a fixed order. Top-k and top-p both keep the logits above some floor,
// found by a radix search over the bits of the value (three passes each); a row with a floor is
// scanned again. A row belongs to one thread.
// Bytes: V elements a pass (from L2 or L3 after the first). Some 30 operations a logit: arithmetic
// is the limit, not memory, until vectors are wide. Noise, some 40 operations a logit, is drawn
// only where a chunk of the row could still beat the best token so far.
#include "cpu/token_confidence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/order.h"
#include "common/philox.h"

namespace dlm::cpu::generic {
namespace {

constexpr int kBlock = 1024;  // logits converted at a time: 4 KiB of floats
constexpr int kLanes = 16;    // independent maxima and sums of a block, whatever the vector width
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

template <class T>
const T* offset(const T* data, int64_t elements) {
  return data ? data + elements : nullptr;
}

// One row of logits as the rest of this file sees it: floats, guided, biased, without NaN and +inf,
// -inf where banned or below the floor.
template <class T>
class Row {
 public:
  Row(const TokenConfidenceParams& p, int64_t n, int64_t source)
      : V(p.V),
        logits_(static_cast<const T*>(p.logits) + source * p.logits_stride),
        uncond_(offset(static_cast<const T*>(p.uncond_logits), source * p.uncond_stride)),
        guidance_(p.cfg_scale.at(n, 0.0f) + 1.0f),
        bias_(offset(p.bias, n / p.bias_rows_per_value * p.V)),
        banned_(offset(p.banned, n / p.banned_rows_per_value * p.banned_count)),
        banned_count_(p.banned_count),
        bitmask_(offset(p.bitmask, n / p.bitmask_rows_per_value * p.bitmask_words)) {}

  // Writes logits [begin, begin + kBlock) as far as there are any, then -inf up to a multiple of
  // kLanes; returns how many were written. begin is a multiple of kBlock.
  int load(int64_t begin, float* z) {
    const int n = int(std::min<int64_t>(kBlock, V - begin));
    if (n == kBlock) {
      convert(begin, kBlock, z);  // a constant length makes tighter loops
    } else {
      convert(begin, n, z);
    }
    if (banned_) {
      for (int64_t i = 0; i < banned_count_; ++i) {
        const uint64_t at = uint64_t(banned_[i] - begin);
        if (at < uint64_t(n)) z[at] = -kInfinity;
      }
    }
    if (bitmask_) apply_bitmask(begin, n, z);
    const float lowest = floor;
    if (lowest > -kInfinity) {
      for (int i = 0; i < n; ++i) z[i] = z[i] >= lowest ? z[i] : -kInfinity;
    }
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int i = n; i < padded; ++i) z[i] = -kInfinity;
    return padded;
  }

  float at(int64_t v) {
    float z[kBlock];
    load(v / kBlock * kBlock, z);
    return z[v % kBlock];
  }

  const int64_t V;
  float floor = -kInfinity;
  int32_t flags = 0;

 private:
  inline void convert(int64_t begin, int n, float* z) {
    const T* logits = logits_ + begin;
    if (uncond_) {
      const T* uncond = uncond_ + begin;
      for (int i = 0; i < n; ++i) {
        const float u = to_float(uncond[i]);
        z[i] = u + guidance_ * (to_float(logits[i]) - u);
      }
    } else {
      for (int i = 0; i < n; ++i) z[i] = to_float(logits[i]);
    }
    if (bias_) {
      const float* bias = bias_ + begin;
      for (int i = 0; i < n; ++i) z[i] += bias[i];
    }
    uint32_t special = 0;  // nothing but NaN and +inf has this property: not <= kLargest
    for (int i = 0; i < n; ++i) special |= uint32_t(!(z[i] <= kLargest));
    if (special) {
      for (int i = 0; i < n; ++i) {
        if (z[i] != z[i]) {
          z[i] = -kInfinity;
          flags |= kFlagNaN;
        } else if (z[i] == kInfinity) {
          z[i] = kLargest;
          flags |= kFlagPosInf;
        }
      }
    }
  }

  void apply_bitmask(int64_t begin, int n, float* z) const {
    for (int i = 0; i < n; i += 32) {
      const uint32_t allowed = uint32_t(bitmask_[(begin + i) / 32]);
      if (allowed == 0xffffffffu) continue;
      const int m = std::min(32, n - i);
      for (int j = 0; j < m; ++j) z[i + j] = allowed >> j & 1 ? z[i + j] : -kInfinity;
    }
  }

  const T* logits_;
  const T* uncond_;
  float guidance_;
  const float* bias_;
  const int64_t* banned_;
  int64_t banned_count_;
  const int32_t* bitmask_;
};

// The largest of n values (a multiple of kLanes), and the second largest, equal to it where it
// occurs twice.
struct TopTwo {
  float first = -kInfinity, second = -kInfinity;
};
TopTwo top_two(const float* z, int n) {
  float first[kLanes], second[kLanes];
  std::fill(first, first + kLanes, -kInfinity);
  std::fill(second, second + kLanes, -kInfinity);
  for (int i = 0; i < n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float lower = z[i + l] < first[l] ? z[i + l] : first[l];
      first[l] = z[i + l] > first[l] ? z[i + l] : first[l];
      second[l] = lower > second[l] ? lower : second[l];
    }
  }
  TopTwo top;
  for (int l = 0; l < kLanes; ++l) {
    top.second = std::max({top.second, second[l], std::min(first[l], top.first)});
    top.first = std::max(top.first, first[l]);
  }
  return top;
}

// Sum of n values (n <= kBlock): of 64 lanes, so that no lane is longer than 16, then pairwise.
double sum(const float* x, int n) {
  constexpr int lanes = 64;
  float lane[lanes] = {};
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) lane[l] += x[i + l];
  }
  for (int l = 0; l < n - i; ++l) lane[l] += x[i + l];
  for (int width = lanes / 2; width; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return double(lane[0]);
}

// weight[i] = e^((z[i] - max) * scale). Differences first: a product of its own could overflow.
void exponentials(const float* z, int n, float max, float scale, float* weight) {
  for (int i = 0; i < n; ++i) weight[i] = exp_normal((z[i] - max) * scale);
}

// The words of 64 consecutive Philox counters, in the order of the vocabulary.
constexpr int kChunk = 256;
void random_words(uint64_t seed, uint32_t position, uint32_t step, uint32_t index4,
                  uint32_t* word) {
  constexpr int n = kChunk / 4;
  uint32_t c0[n], c1[n], c2[n], c3[n];
  for (int i = 0; i < n; ++i) {
    c0[i] = position;
    c1[i] = step;
    c2[i] = uint32_t(Stream::kToken);
    c3[i] = index4 + uint32_t(i);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < n; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < n; ++i) {
    word[4 * i] = c0[i];
    word[4 * i + 1] = c1[i];
    word[4 * i + 2] = c2[i];
    word[4 * i + 3] = c3[i];
  }
}

// At least gumbel(r): -log(-log1p(-u)) <= -log(u), u >= r / 2^32, and log2(m 2^e) >= e + (m - 1)
// for m in [1, 2), which is how a float's bits read as an integer. 1e-3 covers the rounding errors
// of both sides many times over.
float gumbel_bound(uint32_t r) {
  const float half = float(int32_t(r >> 1));
  const float log2_half = float(int32_t(float_to_bits(half))) * 1.1920929e-7f - 127.0f;
  return 0.6931472f * (31.0f - log2_half) + 1e-3f;
}
constexpr float kLargestGumbel = 22.9f;

// The running argmax of z * (1/T) + noise. With a bound in place of the noise, the same arithmetic
// (rounding is monotone) tells what cannot win; most noise is never computed.
class Sampler {
 public:
  Sampler() = default;
  Sampler(const RandomKey& random, int64_t n, float inverse_temperature)
      : seed_(uint64_t(random.seed.at(n, 0))),
        position_(uint32_t(random.position[n])),
        step_(uint32_t(random.step.at(n, 0))),
        inverse_temperature_(inverse_temperature) {}

  // Blocks come in ascending order; only a strictly better token replaces the best.
  void add(const float* z, int n, int64_t begin, float block_largest) {
    if (!can_win(block_largest, kLargestGumbel)) return;
    for (int first = 0; first < n; first += kChunk) {
      const float* chunk = z + first;
      const int m = std::min(kChunk, n - first);
      if (!can_win(top_two(chunk, m).first, kLargestGumbel)) continue;
      uint32_t word[kChunk];
      random_words(seed_, position_, step_, uint32_t((begin + first) / 4), word);
      uint32_t any = 0;
      for (int i = 0; i < m; ++i) any |= uint32_t(can_win(chunk[i], gumbel_bound(word[i])));
      if (!any) continue;
      for (int i = 0; i < m; ++i) {
        if (!can_win(chunk[i], gumbel_bound(word[i]))) continue;
        const float perturbed = chunk[i] * inverse_temperature_ + gumbel(word[i]);
        if (perturbed > best_) {
          best_ = perturbed;
          token = begin + first + i;
          logit = chunk[i];
        }
      }
    }
  }

  int64_t token = -1;  // -1: every perturbed logit was -inf
  float logit = -kInfinity;

 private:
  bool can_win(float z, float noise) const { return z * inverse_temperature_ + noise > best_; }

  uint64_t seed_ = 0;
  uint32_t position_ = 0, step_ = 0;
  float inverse_temperature_ = 1.0f;
  float best_ = -kInfinity;
};

// What a pass over a row finds out. The sums leave out the argmax, whose term is 1.
struct Scan {
  float max = -kInfinity;
  int64_t argmax = -1;
  float second = -kInfinity;
  double weight = 0.0, weighted_exponent = 0.0;
};

struct Wanted {
  bool sums, entropy;
  float scale;  // 1/T of the distribution that the sums describe
};

template <class T>
Scan scan(Row<T>& row, const Wanted& want, Sampler* sampler) {
  Scan found;
  float z[kBlock], weight[kBlock];
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.load(begin, z);
    const TopTwo top = top_two(z, n);
    if (top.first == -kInfinity) continue;
    if (sampler) sampler->add(z, n, begin, top.first);
    if (top.first > found.max) {
      if (want.sums && found.argmax >= 0) {
        // from now on relative to the new maximum; the old one becomes an ordinary term
        const double exponent = (double(found.max) - top.first) * want.scale,
                     factor = std::exp(exponent);
        found.weight += 1.0;
        found.weighted_exponent = factor * (found.weighted_exponent + exponent * found.weight);
        found.weight *= factor;
      }
      found.second = std::max(found.max, top.second);
      found.max = top.first;
      const int64_t at = std::find(z, z + n, top.first) - z;
      found.argmax = begin + at;
      z[at] = -kInfinity;
    } else {
      found.second = std::max(found.second, top.first);
    }
    if (want.sums) {
      exponentials(z, n, found.max, want.scale, weight);
      found.weight += sum(weight, n);
      if (want.entropy) {
        for (int i = 0; i < n; ++i)
          weight[i] *= std::max((z[i] - found.max) * want.scale, kExpUnderflow);
        found.weighted_exponent += sum(weight, n);
      }
    }
  }
  return found;
}

// Top-k counts logits, top-p adds their probabilities.
struct Measure {
  bool mass;
  double limit;  // a count, or a share of all mass
  float max, scale;
};

// The largest value such that it and what lies above it measure more than the limit, as ordered
// bits; 0: there is none. A radix search from the highest bits; every level adds in vocabulary
// order.
template <class T>
uint32_t crossing(Row<T>& row, const Measure& measure) {
  constexpr int kShift[] = {21, 10, 0}, kBits[] = {11, 11, 10};
  double bins[2048];
  float z[kBlock], weight[kBlock];
  uint32_t key[kBlock];
  uint32_t prefix = 0;
  double above = 0.0, limit = measure.limit;
  for (int level = 0; level < 3; ++level) {
    const int shift = kShift[level], bits = kBits[level], size = 1 << bits;
    std::fill(bins, bins + size, 0.0);
    for (int64_t begin = 0; begin < row.V; begin += kBlock) {
      const int n = row.load(begin, z);
      for (int i = 0; i < n; ++i) key[i] = ordered_bits(z[i]);
      // A key less this level's prefix is a bin; what lies outside the prefix's interval becomes
      // too large to be one.
      uint32_t any = 0;
      for (int i = 0; i < n; ++i) {
        key[i] = (key[i] >> shift) - (prefix << bits);
        any |= uint32_t(key[i] < uint32_t(size)) & uint32_t(z[i] > -kInfinity);
      }
      if (!any) continue;
      if (measure.mass) {
        exponentials(z, n, measure.max, measure.scale, weight);
      } else {
        for (int i = 0; i < n; ++i) weight[i] = z[i] > -kInfinity ? 1.0f : 0.0f;
      }
      for (int i = 0; i < n; ++i) {
        if (key[i] < uint32_t(size)) bins[key[i]] += double(weight[i]);
      }
    }
    if (level == 0 && measure.mass) {
      double total = 0.0;
      for (int b = 0; b < size; ++b) total += bins[b];
      limit *= total;
    }
    int found = -1;
    double above_found = 0.0;
    for (int b = size - 1; b >= 0; --b) {
      if (bins[b] == 0.0) continue;
      // below the first level the interval is known to cross: should rounding hide it, its lowest
      // value does
      found = b;
      above_found = above;
      above += bins[b];
      if (above > limit) break;
    }
    if (level == 0 && !(above > limit)) return 0;
    prefix = prefix << bits | uint32_t(found);
    above = above_found;
  }
  return prefix;
}

struct Filter {
  int32_t k;  // 0: off
  float p;    // 1: off
  bool p_first, keep_crossing;
};

// The lowest value kept. Both filters keep whatever is at or above a value, so the higher of the
// two decides.
template <class T>
float filter_floor(Row<T>& row, const Filter& filter, float max, float scale) {
  float by_count = -kInfinity, by_mass = -kInfinity;
  if (filter.k > 0 && filter.k < row.V) {
    const uint32_t kth = crossing(row, Measure{false, double(filter.k) - 1.0, max, scale});
    if (kth) by_count = ordered_value(kth);
  }
  if (filter.p < 1.0f) {
    if (!filter.p_first) row.floor = by_count;  // the mass of what top-k left
    const uint32_t crossed = crossing(row, Measure{true, double(filter.p), max, scale});
    row.floor = -kInfinity;
    if (crossed)
      by_mass =
          filter.keep_crossing ? ordered_value(crossed) : std::min(ordered_value(crossed + 1), max);
  }
  return std::max(by_count, by_mass);
}

template <class T>
void token_confidence_row(const TokenConfidenceParams& p, int64_t n) {
  int64_t token = -1, argmax = -1;
  int32_t flags = 0;
  double confidence = -kInfinity, margin = 0.0, entropy = 0.0, logsumexp = -kInfinity,
         p_given = 0.0;

  const int64_t source = p.row_map ? p.row_map[n] : n;
  if (source >= 0) {
    Row<T> row(p, n, source);
    Sampler sampler;
    const float asked_temperature = p.temperature.at(n, 0.0f);
    const bool samples = asked_temperature > 0.0f;
    const float temperature = samples ? asked_temperature : 1.0f, inverse = 1.0f / temperature;
    const Filter filter{p.top_k.at(n, 0), p.top_p.at(n, 1.0f), p.top_p_first, p.keep_crossing};
    const bool about_kept = p.distribution == Distribution::kFiltered;
    const bool filters = (filter.k > 0 || filter.p < 1.0f) && (samples || about_kept);
    const Wanted statistics{true, p.entropy != nullptr,
                            p.distribution == Distribution::kRaw ? 1.0f : inverse};
    const Wanted maximum{false, false, 1.0f};

    if (samples) sampler = Sampler(p.random, n, inverse);
    Scan found = scan(row, filters && about_kept ? maximum : statistics,
                      samples && !filters ? &sampler : nullptr);
    if (filters && found.argmax >= 0) {
      row.floor = filter_floor(row, filter, found.max, inverse);
      if (about_kept) {
        found = scan(row, statistics, samples ? &sampler : nullptr);
      } else {
        scan(row, maximum, &sampler);
        row.floor = -kInfinity;  // the statistics, p_given too, are about the whole row
      }
    }

    flags = row.flags;
    if (found.argmax < 0) {
      flags |= kFlagNothingAllowed;
    } else {
      argmax = found.argmax;
      const bool sampled = sampler.token >= 0;
      token = sampled ? sampler.token : argmax;
      const double scale = p.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(temperature);
      const double total = 1.0 + found.weight, log_total = std::log1p(found.weight);
      const auto exponent = [&](float logit) { return (double(logit) - found.max) * scale; };
      confidence = sampled ? std::exp(exponent(sampler.logit)) / total : 1.0 / total;
      margin = -std::expm1(exponent(found.second)) / total;
      entropy = log_total - found.weighted_exponent / total;
      logsumexp = found.max * scale + log_total;
      if (p.given && p.given[n] >= 0) p_given = std::exp(exponent(row.at(p.given[n]))) / total;
    }
  }

  p.token[n] = token;
  p.argmax[n] = argmax;
  p.flags[n] = flags;
  p.confidence[n] = float(confidence);
  p.logsumexp[n] = float(logsumexp);
  p.p_given[n] = float(p_given);
  if (p.margin) p.margin[n] = float(margin);
  if (p.entropy) p.entropy[n] = float(entropy);
}

}  // namespace

void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    switch (p.dtype) {
      case DType::kFloat32:
        token_confidence_row<float>(p, n);
        break;
      case DType::kBFloat16:
        token_confidence_row<BFloat16>(p, n);
        break;
      case DType::kFloat16:
        token_confidence_row<Float16>(p, n);
        break;
    }
  }
}

}  // namespace dlm::cpu::generic
