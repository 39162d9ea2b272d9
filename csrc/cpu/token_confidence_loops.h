// SPDX-License-Identifier: Apache-2.0
// Kernels of token_confidence (see token_confidence.cpp) that vectorizers compile well. Each file
// for one instruction set includes this in its namespace, after its load_chunk.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/math.h"
#include "cpu/random_words.h"
#include "cpu/token_confidence.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

float largest_of(const float* x, int64_t n) {
  constexpr int kTogether = 16;
  float top[kTogether];
  std::fill(top, top + kTogether, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) {
    for (int l = 0; l < kTogether; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
  }
  for (int l = 0; l < n - i; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
  float all = top[0];
  for (int l = 1; l < kTogether; ++l) all = top[l] > all ? top[l] : all;
  return all;
}

int64_t index_of(float value, const float* x) {
  int64_t i = 0;
  while (x[i] != value) ++i;
  return i;
}

// The chunk of the argmax is read again, without the argmax; the sums of the others are made
// relative to its maximum.
Summary summarize(const LogitsRow& row, const ChunkSums& sums, bool exponents, float scale) {
  const int64_t chunks = (row.V + kRaceChunk - 1) / kRaceChunk;
  Summary found;
  found.max = largest_of(sums.largest, chunks);
  if (!(found.max > -std::numeric_limits<float>::infinity())) return found;
  const int64_t at = index_of(found.max, sums.largest);
  alignas(64) float z[kRaceChunk];
  load_chunk(row, at, z);
  const int64_t i = index_of(found.max, z);
  found.argmax = at * kRaceChunk + i;
  z[i] = -std::numeric_limits<float>::infinity();
  found.second = std::max({largest_of(z, kRaceChunk), largest_of(sums.largest, at),
                           largest_of(sums.largest + at + 1, chunks - at - 1)});
  const Sums own = sum_chunk(z, found.max, scale);
  found.weight = own.weight;
  found.exponent = exponents ? own.exponent : 0.0;

  constexpr int64_t kTogether = 16;
  double weight[kTogether] = {}, exponent[kTogether] = {};
  const auto add = [&](int64_t begin, int64_t n) {
    float factor[kTogether], x[kTogether];
    for (int64_t l = 0; l < n; ++l) {
      const float difference = (sums.largest[begin + l] - found.max) * scale;
      x[l] = difference > kExpUnderflow ? difference : kExpUnderflow;
      factor[l] = dlm::chunk_exp(difference);
      weight[l] += double(factor[l]) * double(sums.weight[begin + l]);
    }
    if (!exponents) return;
    for (int64_t l = 0; l < n; ++l) {
      exponent[l] += double(factor[l]) * (double(x[l]) * double(sums.weight[begin + l]) +
                                          double(sums.exponent[begin + l]));
    }
  };
  const auto add_all = [&](int64_t begin, int64_t end) {
    for (; begin + kTogether <= end; begin += kTogether) add(begin, kTogether);
    add(begin, end - begin);
  };
  add_all(0, at);
  add_all(at + 1, chunks);
  for (int l = 0; l < kTogether; ++l) {
    found.weight += weight[l];
    found.exponent += exponent[l];
  }
  return found;
}

void masses(const float* z, int64_t n, float max, float scale, uint64_t* mass) {
  for (int64_t i = 0; i < n; ++i) mass[i] = mass_of(dlm::chunk_exp((z[i] - max) * scale));
}

// Processes up to kCount chunks, starting at `first`.
template <int kCount>
void some_chunk_keys(const float* largest, const float* weight, int64_t first, int64_t n,
                     const Draw& draw, float* key) {
  uint32_t word[kCount];
  float top[kCount], sum[kCount], result[kCount];
  random_words<kCount / 4>(draw.seed, draw.position, draw.step,
                           redrawn(Stream::kChunk, draw.redraw), uint32_t(first / 4), word);
  for (int i = 0; i < kCount; ++i) {
    top[i] = i < n ? largest[first + i] : -std::numeric_limits<float>::infinity();
    sum[i] = i < n ? weight[first + i] : 1.0f;
  }
  for (int i = 0; i < kCount; ++i) {
    const float finite = top[i] > -std::numeric_limits<float>::infinity() ? top[i] : 0.0f;
    result[i] = chunk_key(finite, draw.inverse_temperature, sum[i], word[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool any = top[i] > -std::numeric_limits<float>::infinity();
    key[first + i] = any ? result[i] : -std::numeric_limits<float>::infinity();
  }
}

void chunk_keys(const float* largest, const float* weight, int64_t n, const Draw& draw,
                float* key) {
  int64_t first = 0;
  for (; n - first > 16; first += 64)
    some_chunk_keys<64>(largest, weight, first, std::min<int64_t>(64, n - first), draw, key);
  if (first < n) some_chunk_keys<16>(largest, weight, first, n - first, draw, key);
}

Drawn race_tokens(const LogitsRow& row, int64_t chunk, const Draw& draw) {
  const int64_t begin = chunk * kRaceChunk;
  const int n = int(std::min<int64_t>(kRaceChunk, row.V - begin));
  float z[kRaceChunk], key[kRaceChunk];
  uint32_t word[kRaceChunk];
  load_chunk(row, chunk, z);
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
    if (z[i] > -std::numeric_limits<float>::infinity() && (best < 0 || key[i] > key[best]))
      best = i;
  }
  return best < 0 ? Drawn{-1, -std::numeric_limits<float>::infinity()}
                  : Drawn{begin + best, z[best]};
}

}  // namespace
}  // namespace dlm::cpu::DLM_NAMESPACE
