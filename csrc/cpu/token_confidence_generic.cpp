// SPDX-License-Identifier: Apache-2.0
// Scans of token_confidence (see token_confidence.cpp) in plain C++: a block of logits is converted
// to float on the stack, and its terms are added. Sums are float over the lanes of a block and
// double over blocks, in a fixed order.
// Bytes: V elements a pass (from L2 or L3 after the first). Some 30 operations a logit: arithmetic
// is the limit, not memory, until vectors are wide. A draw adds one key for each 256 logits, and
// the noise of 256 (common/race.h). token_confidence_avx2.cpp compiles all of this a second time,
// in a namespace of its own.
#include "cpu/token_confidence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/math.h"
#include "common/order.h"
#include "common/race.h"
#include "cpu/random_words.h"

#ifndef DLM_NAMESPACE
#define DLM_NAMESPACE generic
#endif

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

constexpr int kBlock = 1024;  // logits converted at a time: 4 KiB of floats
constexpr int kLanes = 16;    // independent maxima and sums of a block, whatever the vector width
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// One row of logits as the rest of this file sees it: floats, guided, biased, without NaN and +inf,
// -inf where banned or below the floor.
template <class T>
class Row {
 public:
  explicit Row(const LogitsRow& row)
      : row_(row),
        logits_(static_cast<const T*>(row.logits)),
        uncond_(static_cast<const T*>(row.uncond)) {}

  // Writes logits [begin, min(begin + kBlock, end)), then -inf up to a multiple of kLanes; returns
  // how many were written.
  int load(int64_t begin, int64_t end, float* z) {
    const int n = int(std::min<int64_t>(kBlock, end - begin));
    if (n == kBlock) {
      convert(begin, kBlock, z);  // a constant length makes tighter loops
    } else {
      convert(begin, n, z);
    }
    if (row_.banned) {
      for (int64_t i = 0; i < row_.banned_count; ++i) {
        const uint64_t at = uint64_t(row_.banned[i] - begin);
        if (at < uint64_t(n)) z[at] = -kInfinity;
      }
    }
    if (row_.bitmask) apply_bitmask(begin, n, z);
    const float lowest = row_.floor;
    if (lowest > -kInfinity) {
      for (int i = 0; i < n; ++i) z[i] = z[i] >= lowest ? z[i] : -kInfinity;
    }
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int i = n; i < padded; ++i) z[i] = -kInfinity;
    return padded;
  }

  int32_t flags = 0;

 private:
  inline void convert(int64_t begin, int n, float* z) {
    const T* logits = logits_ + begin;
    if (uncond_) {
      const T* uncond = uncond_ + begin;
      for (int i = 0; i < n; ++i) {
        const float u = to_float(uncond[i]);
        z[i] = u + row_.guidance * (to_float(logits[i]) - u);
      }
    } else {
      for (int i = 0; i < n; ++i) z[i] = to_float(logits[i]);
    }
    if (row_.bias) {
      const float* bias = row_.bias + begin;
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
      const uint32_t allowed = uint32_t(row_.bitmask[(begin + i) / 32]);
      if (allowed == 0xffffffffu) continue;
      const int m = std::min(32, n - i);
      for (int j = 0; j < m; ++j) z[i + j] = allowed >> j & 1 ? z[i + j] : -kInfinity;
    }
  }

  const LogitsRow& row_;
  const T* logits_;
  const T* uncond_;
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

// What a race and the statistics need of a chunk: its largest logit, and the sums of
// w = chunk_weight(z) and of (z - largest) / T w.
struct Chunk {
  float largest = -kInfinity, weight = 0.0f, exponent = 0.0f;
};
constexpr int kChunks = kBlock / kRaceChunk;  // of a block

// Sums of n logits of a chunk, n a multiple of kLanes; `largest` is the largest, or one left out.
Chunk add_up(const float* z, int n, float largest, float inverse, bool exponents) {
  float weight[kRaceChunk];
  for (int i = 0; i < n; ++i) weight[i] = chunk_weight(z[i], largest, inverse);
  for (int i = n; i < kRaceChunk; ++i) weight[i] = 0.0f;
  Chunk chunk{largest};
  if (exponents) {
    float exponent[kRaceChunk];
    for (int i = 0; i < n; ++i)
      exponent[i] = weight[i] * std::max((z[i] - largest) * inverse, kExpUnderflow);
    for (int i = n; i < kRaceChunk; ++i) exponent[i] = 0.0f;
    chunk.exponent = chunk_sum(exponent);
  }
  chunk.weight = chunk_sum(weight);
  return chunk;
}

// The running race of chunks. Where the statistics are about the same temperature, its sums are
// theirs.
class Race {
 public:
  explicit Race(const Wanted& want)
      : want_(want),
        draw_(want.draw),
        is_shared_(want.sums && want.scale == want.draw.inverse_temperature) {}

  // Blocks come in ascending order.
  void add(const float* z, int n, int64_t begin) {
    uint32_t word[kChunks];
    random_words<1>(draw_.seed, draw_.position, draw_.step, redrawn(Stream::kChunk, draw_.redraw),
                    uint32_t(begin / kBlock), word);
    for (int c = 0; c < kChunks; ++c) {
      chunk_[c] = {};
      const int first = c * kRaceChunk, m = std::min(kRaceChunk, n - first);
      if (m <= 0) continue;
      const float largest = top_two(z + first, m).first;
      // No sum is above the number of tokens, no noise above 22.9: 0.1 covers all rounding.
      const float most = tempered(largest, draw_.inverse_temperature) + (5.6f + 22.9f + 0.1f);
      if (largest == -kInfinity || !(is_shared_ || most > key_)) continue;
      chunk_[c] =
          add_up(z + first, m, largest, draw_.inverse_temperature, is_shared_ && want_.entropy);
      const float key = chunk_key(largest, draw_.inverse_temperature, chunk_[c].weight, word[c]);
      if (!(key > key_)) continue;
      key_ = key;
      winner_ = begin / kRaceChunk + c;
    }
  }

  bool is_shared() const { return is_shared_; }

  // The sums of the last block, relative to `max`; without its logit `at`, which has been made
  // -inf, if that is not negative.
  void add_to(Scan& found, const float* z, int n, int at) {
    const float inverse = draw_.inverse_temperature;
    if (at >= 0) {
      const int c = at / kRaceChunk, first = c * kRaceChunk;
      chunk_[c] = add_up(z + first, std::min(kRaceChunk, n - first), chunk_[c].largest, inverse,
                         want_.entropy);
    }
    for (const Chunk& chunk : chunk_) {
      if (chunk.largest == -kInfinity) continue;
      const float x = (chunk.largest - found.max) * inverse, factor = chunk_exp(x);
      if (factor == 0.0f) continue;
      found.weight += double(factor) * chunk.weight;
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
  Chunk chunk_[kChunks];
  float key_ = -kInfinity;
  int64_t winner_ = -1;
};

template <class T>
Drawn race_tokens_as(const LogitsRow& logits, int64_t chunk, const Draw& draw) {
  const int64_t begin = chunk * kRaceChunk;
  float z[kRaceChunk], key[kRaceChunk];
  uint32_t word[kRaceChunk];
  const int n = Row<T>(logits).load(begin, std::min(begin + kRaceChunk, logits.V), z);
  const auto draw_words = [&](auto count) {
    random_words<count / 4>(draw.seed, draw.position, draw.step,
                            redrawn(Stream::kToken, draw.redraw), uint32_t(begin / 4), word);
  };
  if (n <= 32) {
    draw_words(std::integral_constant<int, 32>());
  } else {
    draw_words(std::integral_constant<int, kRaceChunk>());
  }
  for (int i = 0; i < n; ++i) key[i] = token_key(z[i], draw.inverse_temperature, word[i]);
  int best = -1;
  for (int i = 0; i < n; ++i) {
    if (z[i] > -kInfinity && (best < 0 || key[i] > key[best])) best = i;
  }
  return best < 0 ? Drawn{-1, -kInfinity} : Drawn{begin + best, z[best]};
}

template <class T>
Scan scan_as(const LogitsRow& logits, int64_t begin, int64_t end, const Wanted& want) {
  Row<T> row(logits);
  Scan found;
  Race race(want);
  float z[kBlock], weight[kBlock];
  for (; begin < end; begin += kBlock) {
    const int n = row.load(begin, end, z);
    const TopTwo top = top_two(z, n);
    if (top.first == -kInfinity) continue;
    if (want.sample) race.add(z, n, begin);
    int64_t at = -1;
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
      at = 0;
      while (z[at] != top.first) ++at;
      found.argmax = begin + at;
      z[at] = -kInfinity;
    } else {
      found.second = std::max(found.second, top.first);
    }
    if (want.sample && race.is_shared()) {
      race.add_to(found, z, n, int(at));
    } else if (want.sums) {
      exponentials(z, n, found.max, want.scale, weight);
      found.weight += sum(weight, n);
      if (want.entropy) {
        for (int i = 0; i < n; ++i)
          weight[i] *= std::max((z[i] - found.max) * want.scale, kExpUnderflow);
        found.weighted_exponent += sum(weight, n);
      }
    }
  }
  found.flags = row.flags;
  race.finish(found);
  return found;
}

uint64_t units(float weight) { return uint64_t(int64_t(weight * kMassUnits)); }

template <class T>
void add_measures_as(const LogitsRow& logits, int64_t begin, int64_t end, const Measure& measure,
                     const Bins& bins) {
  Row<T> row(logits);
  float z[kBlock], weight[kBlock];
  uint32_t key[kBlock];
  int hit[kBlock + 1];
  uint64_t total = 0;
  const uint32_t span = bins.highest - bins.lowest, skipped = bins.lowest - bins.base;
  for (; begin < end; begin += kBlock) {
    const int n = row.load(begin, end, z);
    // A key less the lowest is at most the span, or the logit lies outside.
    for (int i = 0; i < n; ++i) key[i] = ordered_bits(z[i]) - bins.lowest;
    int hits = 0;
    for (int i = 0; i < n; ++i) {
      hit[hits] = i;
      hits += int(key[i] <= span);  // no branch: it would be a toss-up
    }
    if (measure.mass && (hits || bins.total)) {
      exponentials(z, n, measure.max, measure.scale, weight);
      for (int i = 0; bins.total && i < n; ++i) total += units(weight[i]);
    }
    for (int h = 0; h < hits; ++h) {
      const int i = hit[h];
      bins.sum[(key[i] + skipped) >> bins.shift] += measure.mass ? units(weight[i]) : 1;
    }
  }
  if (bins.total) *bins.total += total;
}

}  // namespace

Drawn race_tokens(const LogitsRow& row, int64_t chunk, const Draw& draw) {
  switch (row.dtype) {
    case DType::kFloat32:
      return race_tokens_as<float>(row, chunk, draw);
    case DType::kBFloat16:
      return race_tokens_as<BFloat16>(row, chunk, draw);
    default:
      return race_tokens_as<Float16>(row, chunk, draw);
  }
}

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

}  // namespace dlm::cpu::DLM_NAMESPACE
