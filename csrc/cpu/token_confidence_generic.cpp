// SPDX-License-Identifier: Apache-2.0
// Kernels of token_confidence (see token_confidence.cpp) in plain C++, which specify the bits of
// the others. A chunk is converted to float on the stack, and its terms are added.
#include <algorithm>
#include <limits>

#include "common/math.h"
#include "cpu/token_confidence.h"

#define DLM_NAMESPACE generic

namespace dlm::cpu::generic {
namespace {

constexpr int kLanes = 16;  // number of independent maxima, whatever the vector width
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// A row as the rest of this file sees it: floats with guidance and bias, without NaN and +inf, and
// -inf where banned or below the floor.
template <class T>
class Row {
 public:
  explicit Row(const LogitsRow& row)
      : row_(row),
        logits_(static_cast<const T*>(row.logits)),
        uncond_(static_cast<const T*>(row.uncond)) {}

  // Writes the logits of a chunk, -inf beyond the row; returns the largest.
  float load(int64_t chunk, float* z) {
    const int64_t begin = chunk * kRaceChunk;
    const int n = int(std::min<int64_t>(kRaceChunk, row_.V - begin));
    convert(begin, n, z);
    for (int i = n; i < kRaceChunk; ++i) z[i] = -kInfinity;
    for (int64_t i = 0; row_.banned && i < row_.banned_count; ++i) {
      const uint64_t at = uint64_t(row_.banned[i] - begin);
      if (at < uint64_t(kRaceChunk)) z[at] = -kInfinity;
    }
    if (row_.bitmask) apply_bitmask(begin, n, z);
    float top[kLanes];
    std::fill(top, top + kLanes, -kInfinity);
    for (int i = 0; i < kRaceChunk; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        z[i + l] = z[i + l] >= row_.floor ? z[i + l] : -kInfinity;
        top[l] = z[i + l] > top[l] ? z[i + l] : top[l];
      }
    }
    return *std::max_element(top, top + kLanes);
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
    uint32_t special = 0;  // only NaN and +inf have this property: not <= kLargest
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

Sums add_up(const float* z, float largest, float scale, bool exponents) {
  float weight[kRaceChunk], exponent[kRaceChunk];
  for (int i = 0; i < kRaceChunk; ++i) weight[i] = chunk_weight(z[i], largest, scale);
  if (exponents) {
    for (int i = 0; i < kRaceChunk; ++i)
      exponent[i] = weight[i] * std::max((z[i] - largest) * scale, kExpUnderflow);
  }
  return {chunk_sum(weight), exponents ? chunk_sum(exponent) : 0.0f};
}

Sums sum_chunk(const float* z, float largest, float scale) {
  return add_up(z, largest, scale, true);
}

template <class T>
int32_t sum_chunks_as(const LogitsRow& logits, int64_t begin, int64_t end, const Wanted& want,
                      const ChunkSums& sums) {
  Row<T> row(logits);
  float z[kRaceChunk];
  for (int64_t c = begin; c < end; ++c) {
    const float top = sums.largest[c] = row.load(c, z);
    const bool any = top > -kInfinity;
    const Sums found = any ? add_up(z, top, want.scale, want.exponent) : Sums{0.0f, 0.0f};
    sums.weight[c] = found.weight;
    if (want.exponent) sums.exponent[c] = found.exponent;
    if (want.tempered)
      sums.tempered[c] = any ? add_up(z, top, want.inverse_temperature, false).weight : 0.0f;
  }
  return row.flags;
}

int32_t sum_chunks(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want,
                   const ChunkSums& sums) {
  switch (row.dtype) {
    case DType::kFloat32:
      return sum_chunks_as<float>(row, begin, end, want, sums);
    case DType::kBFloat16:
      return sum_chunks_as<BFloat16>(row, begin, end, want, sums);
    default:
      return sum_chunks_as<Float16>(row, begin, end, want, sums);
  }
}

float load_chunk(const LogitsRow& row, int64_t chunk, float* z) {
  switch (row.dtype) {
    case DType::kFloat32:
      return Row<float>(row).load(chunk, z);
    case DType::kBFloat16:
      return Row<BFloat16>(row).load(chunk, z);
    default:
      return Row<Float16>(row).load(chunk, z);
  }
}

int64_t collect(const float* z, float low, float high, float* to, uint64_t* above) {
  int64_t count = 0;
  for (int i = 0; i < kRaceChunk; ++i) {
    *above += uint64_t(z[i] > high);
    to[count] = z[i];
    count += int64_t(z[i] >= low && z[i] <= high);  // no branch: it would be unpredictable
  }
  return count;
}

uint64_t mass_above(const float* z, float max, float scale, float above) {
  uint64_t total = 0;
  for (int i = 0; i < kRaceChunk; ++i)
    total += mass_of(keep_if(z[i] > above, chunk_exp((z[i] - max) * scale)));
  return total;
}

}  // namespace
}  // namespace dlm::cpu::generic

#include "cpu/token_confidence_loops.h"

namespace dlm::cpu::generic {

TokenConfidenceKernels token_confidence() {
  return {sum_chunks, load_chunk, sum_chunk,  summarize,   collect,
          mass_above, masses,     chunk_keys, race_tokens, nullptr};
}

}  // namespace dlm::cpu::generic
