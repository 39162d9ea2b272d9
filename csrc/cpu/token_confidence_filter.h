// SPDX-License-Identifier: Apache-2.0
// The floor of a filtered row: the lowest logit that top-k and top-p keep. Both keep everything at
// or above some value, which is the largest one such that the measure of all logits at or above it
// exceeds a limit; top-k counts logits, top-p adds up their masses. Nothing is sorted, and few
// logits are examined: the chunks' largest logits, or a sample, indicate where the value should be;
// one pass over the chunks that reach that range collects the logits in it; and a search by bins
// finds the value among these few. Measures are integers, so neither the guess nor the order
// affects the result.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/order.h"
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// Values, and the mass of each where masses are measured, with a fixed capacity.
struct Measured {
  float* value;
  uint64_t* mass;
  int64_t size;
};

// Working memory of a search: the collected values, and a few others.
class FloorScratch {
 public:
  static constexpr int64_t kSample = 2048, kOfChunk = 16;  // see FloorSearch::sampled

  static int64_t bytes(int64_t V) {
    return (values(V) + others(V)) * int64_t(sizeof(uint64_t) + sizeof(float));
  }
  FloorScratch(void* memory, int64_t V) {
    found.mass = static_cast<uint64_t*>(memory);
    other.mass = found.mass + values(V);
    found.value = reinterpret_cast<float*>(other.mass + others(V));
    other.value = found.value + values(V);
  }

  Measured found, other;

 private:
  static int64_t values(int64_t V) { return (V + 2 * kRaceChunk + 1) / 2 * 2; }
  static int64_t others(int64_t V) { return kSample + kOfChunk + (V / kRaceChunk + 2) / 2 * 2; }
};

class FloorSearch {
 public:
  // `largest` and `tempered` are as in ChunkSums; `max` is that of the row.
  FloorSearch(const TokenConfidenceKernels& kernels, const LogitsRow& row, const float* largest,
              const float* tempered, float max, float inverse_temperature, FloorScratch& scratch)
      : kernels_(kernels),
        row_(row),
        chunks_((row.V + kRaceChunk - 1) / kRaceChunk),
        largest_(largest),
        tempered_(tempered),
        max_(max),
        inverse_(inverse_temperature),
        found_(scratch.found),
        scratch_(scratch.other) {}

  // Returns the k-th largest logit, -inf if there are fewer.
  float of_count(int64_t k) {
    by_mass_ = false;
    lowest_ = -kLargest;
    return search(uint64_t(k - 1), 0.0);
  }

  // Returns the largest value such that the logits at or above it have more than `share` of the
  // mass of all logits at or above `floor`; -inf if there is none.
  float of_share(float share, float floor) {
    by_mass_ = true;
    row_.floor = floor;
    // V logits below this have less than (1 - share) times the weight of the largest one.
    const double depth = std::log(double(row_.V) / (1.0 - double(share))) + 0.1;
    lowest_ = std::max(float(double(max_) - depth / double(inverse_)), -kLargest);
    const double total = double(total_mass());
    return search(uint64_t(double(share) * total), total);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kLargest = std::numeric_limits<float>::max();
  struct Bracket {
    float low, high;
  };

  static float next(float value, int by) {
    return ordered_value(ordered_bits(value) + uint32_t(by));
  }

  // `total` is the total measure, 0 if unknown.
  float search(uint64_t limit, double total) {
    Bracket in = guess(limit, total);
    for (;;) {
      const uint64_t above = collect(in);
      float found;
      if (above > limit) {
        in = {next(in.high, 1), max_};
      } else if (crossing(found_, above, limit, found)) {
        return found;
      } else if (in.low <= lowest_) {
        return -kInfinity;
      } else {
        in = {lowest_, next(in.low, -1)};
      }
    }
  }

  bool has_any(int64_t chunk, float low) const {
    return largest_[chunk] >= std::max({low, row_.floor, -kLargest});
  }

  // If the largest logits of some groups suffice to exceed the limit, the value is at or above one
  // of them. Chunks are such groups; in a row of few chunks, parts of chunks.
  Bracket guess(uint64_t limit, double total) {
    constexpr int64_t kFewChunks = 64;
    constexpr int kGroups = 16;  // per chunk
    float low;
    Measured& top = scratch_;
    top.size = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      if (has_any(c, lowest_)) top.value[top.size++] = largest_[c];
    }
    measure(top);
    if (crossing(top, 0, limit, low)) return {low, max_};
    if (chunks_ > kFewChunks) return sampled(limit, total);

    top.size = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      if (!has_any(c, lowest_)) continue;
      kernels_.load_chunk(row_, c, z_);
      float of_group[kGroups];
      std::copy(z_, z_ + kGroups, of_group);
      for (int i = kGroups; i < kRaceChunk; i += kGroups) {
        for (int g = 0; g < kGroups; ++g) of_group[g] = std::max(of_group[g], z_[i + g]);
      }
      for (const float z : of_group) {
        if (z >= lowest_) top.value[top.size++] = z;
      }
    }
    measure(top);
    return crossing(top, 0, limit, low) ? Bracket{low, max_} : Bracket{lowest_, max_};
  }

  // The measure of the logits at or above each of several values is estimated from the chunks'
  // largest logits and a sample of the others. The bracket ranges from the highest value that is
  // certainly too low (by three standard errors) to the lowest that is too high.
  Bracket sampled(uint64_t limit, double total) {
    constexpr int64_t kSize = FloorScratch::kSample, kOfChunk = FloorScratch::kOfChunk;
    constexpr int kBins = 512;
    Measured& sample = scratch_;
    const int64_t step = (chunks_ * kOfChunk + kSize - 1) / kSize;
    int64_t looked_at = 0;
    sample.size = 0;
    float from = max_;
    for (int64_t c = 0; looked_at < kSize && c < chunks_; c += step, looked_at += kOfChunk) {
      if (!has_any(c, lowest_)) continue;
      kernels_.load_chunk(row_, c, z_);
      const int64_t first = c / step * kOfChunk % kRaceChunk;  // a different place in each chunk
      for (int64_t i = first; i < first + kOfChunk; ++i) {
        const bool used = z_[i] >= lowest_ && z_[i] < largest_[c];
        from = used ? std::min(from, z_[i]) : from;
        sample.value[sample.size] = z_[i];
        sample.size += int64_t(used);
      }
    }
    if (!(from < max_)) return {lowest_, max_};

    const double scale = kBins / (double(max_) - double(from));
    double part[kBins] = {}, square[kBins] = {};
    const auto add = [&](const Measured& x, double factor, bool surely) {
      for (int64_t i = 0; i < x.size; ++i) {
        const double at = (double(x.value[i]) - double(from)) * scale;
        const int bin = int(std::clamp(at, 0.0, double(kBins - 1)));
        const double measure = factor * (by_mass_ ? double(x.mass[i]) : 1.0);
        part[bin] += measure;
        square[bin] += surely ? 0.0 : measure * measure;
      }
    };
    measure(sample);
    add(sample, double(row_.V) / double(looked_at), false);
    std::copy(largest_, largest_ + chunks_, sample.value);
    sample.size = chunks_;
    measure(sample);
    add(sample, 1.0, true);

    double above = 0.0, error = 0.0, below = 0.0, error_below = 0.0;
    for (int b = 0; b < kBins; ++b) below += part[b], error_below += square[b];
    Bracket in{lowest_, max_};
    for (int b = kBins - 1; b >= 0; --b) {
      above += part[b], error += square[b];
      below -= part[b], error_below -= square[b];
      // Use the rest of the total where that is more precise.
      const bool rest = total > 0.0 && error_below < error;
      const double estimate = rest ? total - below : above;
      const double off = 3.0 * std::sqrt(std::max(rest ? error_below : error, 0.0));
      const float value = float(double(from) + double(b) / scale);
      if (estimate + off <= double(limit)) in.high = value;
      if (estimate - off > double(limit)) return {std::max(value, lowest_), in.high};
    }
    return in;
  }

  // Collects and measures the logits in the bracket; returns the measure of those above it.
  uint64_t collect(Bracket in) {
    uint64_t above = 0;
    int64_t count = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      if (!has_any(c, in.low)) continue;
      kernels_.load_chunk(row_, c, z_);
      uint64_t higher = 0;
      count += kernels_.collect(z_, in.low, in.high, found_.value + count, &higher);
      if (higher && by_mass_) higher = kernels_.mass_above(z_, max_, inverse_, in.high);
      above += higher;
    }
    found_.size = count;
    measure(found_);
    return above;
  }

  void measure(Measured& x) const {
    if (by_mass_) kernels_.masses(x.value, x.size, max_, inverse_, x.mass);
  }

  // Total mass, from the sums of the chunks.
  uint64_t total_mass() {
    uint64_t total = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      if (!has_any(c, -kLargest)) continue;
      float weight = tempered_[c];
      if (row_.floor > -kInfinity) {
        kernels_.load_chunk(row_, c, z_);
        weight = kernels_.sum_chunk(z_, largest_[c], inverse_).weight;
      }
      total += mass_of(weight * chunk_exp((largest_[c] - max_) * inverse_));
    }
    return total;
  }

  // Finds the largest of the values such that it and all above it measure more than `limit`, where
  // `above` is the measure of everything above all of them. Each round divides the values' range
  // into bins, and continues with the bin that crosses the limit. Destroys `x`.
  bool crossing(Measured& x, uint64_t above, uint64_t limit, float& value) const {
    constexpr int kMostBins = 2048;
    uint64_t sum[kMostBins];
    int64_t n = x.size;
    for (;;) {
      if (n == 0) return false;
      float least = x.value[0], most = x.value[0];
      for (int64_t i = 0; i < n; ++i) {
        least = std::min(least, x.value[i]);
        most = std::max(most, x.value[i]);
      }
      const int bins = std::clamp(int(n / 4), 16, kMostBins);
      // In double, a difference of floats neither overflows nor underflows.
      const double scale = most > least ? double(bins - 1) / (double(most) - double(least)) : 0.0;
      const auto bin_of = [&](float z) { return int((double(z) - double(least)) * scale); };
      std::fill(sum, sum + bins, 0);
      for (int64_t i = 0; i < n; ++i) sum[bin_of(x.value[i])] += by_mass_ ? x.mass[i] : 1;
      int b = bins - 1;
      for (; b >= 0 && above + sum[b] <= limit; --b) above += sum[b];
      if (b < 0) return false;  // only possible in the first round: measures are exact
      value = most;
      if (most == least) return true;
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        const bool inside = bin_of(x.value[i]) == b;
        x.value[kept] = x.value[i];
        if (by_mass_) x.mass[kept] = x.mass[i];
        kept += int64_t(inside);
      }
      n = kept;
    }
  }

  const TokenConfidenceKernels& kernels_;
  LogitsRow row_;
  const int64_t chunks_;
  const float *const largest_, *const tempered_;
  const float max_, inverse_;
  bool by_mass_ = false;
  float lowest_ = -kLargest;  // the value cannot be lower
  Measured &found_, &scratch_;
  alignas(64) float z_[kRaceChunk];
};

}  // namespace dlm::cpu
