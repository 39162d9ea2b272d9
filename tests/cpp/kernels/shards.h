// SPDX-License-Identifier: Apache-2.0
// A vocabulary in shards: where it is cut, and what the shards of a ConfidenceCase say together.
#pragma once
#include "common/shard.h"
#include "kernels/confidence_case.h"

namespace check {

// Where shards begin, and the end of the last: multiples of a chunk, none of them empty.
inline std::vector<int64_t> cuts(int64_t V, int64_t shards) {
  std::vector<int64_t> at = {0};
  for (int64_t s = 1; s < shards; ++s) {
    const int64_t next = V * s / shards / dlm::kRaceChunk * dlm::kRaceChunk;
    if (next > at.back()) at.push_back(next);
  }
  at.push_back(V);
  return at;
}

// The address of element 0 of rows whose element `first` is at `at`.
inline const void* before(const void* at, int64_t first, int64_t size) {
  return reinterpret_cast<const void*>(uintptr_t(at) - uintptr_t(first * size));
}

// Columns [first, end) of rows, in an allocation of their own that ends with them; the first of
// them `gap` elements behind its start, and each row that much longer.
struct Columns {
  Array<uint8_t> data;
  int64_t stride;
  Columns(const void* from, int64_t rows, int64_t from_stride, int64_t first, int64_t end,
          int64_t size, int64_t gap)
      : stride(end - first + gap) {
    data = Array<uint8_t>(size_t(size * rows * stride));
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(&data[size_t(size * (r * stride + gap))],
             static_cast<const uint8_t*>(from) + size * (r * from_stride + first),
             size_t(size * (end - first)));
    }
    begin_ = before(data.data() + size * gap, first, size);
  }
  const void* begin() const { return begin_; }

 private:
  const void* begin_;
};

// What a case's rows share of a shard's tokens, and in `p` the shard itself.
struct ShardOf {
  Columns bias, bitmask;
  ShardOf(const ConfidenceCase& c, int64_t first, int64_t end, dlm::TokenConfidenceParams& p)
      : bias(c.bias.data(), p.N, p.V, first, end, 4, 0),
        bitmask(c.bitmask.data(), p.N, p.bitmask_words, first / 32, (end + 31) / 32, 4, 0) {
    if (p.bias) p.bias = static_cast<const float*>(bias.begin());
    if (p.bitmask) p.bitmask = static_cast<const int32_t*>(bitmask.begin());
    p.bitmask_words = bitmask.stride;
    p.first = first, p.V = end;
  }
};

// Writes the results of all shards' partial results, [S][N, kShardWords], to the case's.
inline void combine(ConfidenceCase& c, const std::vector<Array<int64_t>>& shards) {
  using namespace dlm;
  for (int64_t n = 0; n < c.p.N; ++n) {
    const auto words = [&](const Array<int64_t>& shard) { return shard.data() + n * kShardWords; };
    const int64_t* best = nullptr;
    const int64_t* drawn = nullptr;
    const int64_t* given = nullptr;
    int64_t flags = 0;
    float second = -INFINITY;
    for (const auto& shard : shards) {
      const int64_t* own = words(shard);
      flags |= own[kShardFlags];
      if (own[kShardArgmax] >= 0) {
        const float largest = low_float(own[kShardLargest]);
        if (!best || largest > low_float(best[kShardLargest])) best = own;
      }
      if (own[kShardToken] >= 0 &&
          (!drawn || low_float(own[kShardDrawn]) > low_float(drawn[kShardDrawn])))
        drawn = own;
      if (own[kShardGiven] >> 32) given = own;
    }
    const size_t i = size_t(n);
    float* const out = &c.statistics[i];
    const int64_t N = c.p.N;
    if (!best) {
      c.token[i] = c.argmax[i] = -1;
      c.flags[i] = flags & kFlagUnused ? 0 : int32_t(flags) | kFlagNothingAllowed;
      out[0] = out[N] = -INFINITY;
      out[2 * N] = out[3 * N] = out[4 * N] = 0;
      out[5 * N] = -INFINITY;
      continue;
    }
    const float asked = c.p.temperature.at(n, 0.0f), max = low_float(best[kShardLargest]);
    const double scale =
        c.p.distribution == Distribution::kRaw || !(asked > 0) ? 1.0 : 1.0 / double(asked);
    int64_t digits[kShardWords] = {};
    const ShardSums sums(digits, max, scale);
    for (const auto& shard : shards) {
      const int64_t* own = words(shard);
      if (own[kShardArgmax] < 0) continue;
      const float largest = low_float(own[kShardLargest]);
      second = std::fmax(second, own == best ? high_float(own[kShardLargest]) : largest);
      sums.add_sums(own, largest);
      if (own != best)
        sums.add(largest, low_float(own[kShardWeight]), low_float(own[kShardExponent]));
    }
    const double others = sums.weights.over(sums.power) / sums.factor;
    const double moments = sums.exponents.over(sums.power) / sums.factor;
    const double rest = double(high_float(best[kShardWeight])) + others, total = 1.0 + rest;
    const double moment =
        double(high_float(best[kShardExponent])) + (moments - sums.exponent_of(max) * others);
    const auto probability = [&](float z) { return std::exp((double(z) - max) * scale) / total; };
    c.argmax[i] = best[kShardArgmax];
    c.token[i] = drawn ? drawn[kShardToken] : best[kShardArgmax];
    c.flags[i] = int32_t(flags);
    out[0] = float(drawn ? probability(high_float(drawn[kShardDrawn])) : 1.0 / total);
    out[N] = float(max * scale + std::log1p(rest));
    out[2 * N] = given ? float(probability(low_float(given[kShardGiven]))) : 0.0f;
    out[3 * N] = float(-std::expm1((double(second) - max) * scale) / total);
    out[4 * N] = float(std::log1p(rest) - moment / total);
    out[5 * N] = -INFINITY;
  }
}

// In 1, 2, 3 and 8 shards, of which `run_shard(first, end, words)` makes one: the case's results,
// and the same bits in any cut.
template <class RunShard>
std::string wrong_in_shards(ConfidenceCase& c, RunShard run_shard) {
  std::vector<float> whole;
  for (const int64_t count : {1, 2, 3, 8}) {
    std::vector<Array<int64_t>> shards;
    const std::vector<int64_t> at = cuts(c.p.V, count);
    for (size_t s = 0; s + 1 < at.size(); ++s) {
      shards.emplace_back(size_t(c.p.N * dlm::kShardWords), -77);
      run_shard(at[s], at[s + 1], shards.back().data());
    }
    combine(c, shards);
    const std::string wrong = c.wrong();
    if (!wrong.empty()) return wrong + ", in " + std::to_string(count) + " shards";
    if (whole.empty()) whole.assign(c.statistics.begin(), c.statistics.end());
    if (memcmp(whole.data(), c.statistics.data(), whole.size() * sizeof(float)))
      return "other bits in " + std::to_string(count) + " shards than in one";
  }
  return "";
}

}  // namespace check
