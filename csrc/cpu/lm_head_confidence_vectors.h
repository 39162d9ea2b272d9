// SPDX-License-Identifier: Apache-2.0
// Products of hidden states and an LM head (see lm_head_confidence.cpp) in vectors: each file for
// one instruction set includes this after its simd_*.h. The lanes of a vector are rows, which are
// packed. A word of a token's weights is broadcast directly from memory, so the weights are read
// once, in order, and are not copied unless their type differs from that of the products. Words are
// floats or, where products of pairs are available (AVX512_BF16), pairs of bf16. A sum runs through
// D in ascending order, kHeadDepth words at a time, so its bits depend only on its row and token.
// Flops: 2 D per row and token. With few rows, reading the weights is the limit.
#pragma once
#include <algorithm>

#include "cpu/lm_head_confidence.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

constexpr int64_t kGroup = 2 * kHeadLanes;
static_assert(kHeadLanes == kWidth);

template <class T>
struct FloatProducts {
  using Element = T;
  static constexpr int64_t kElements = 1;  // elements per word

  static bool are_words(const T*, int64_t, int64_t) { return sizeof(T) == sizeof(uint32_t); }
  // Writes the words of n elements, zero-padded to a whole vector.
  DLM_SIMD static void words(const T* from, int64_t n, uint32_t* to) {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, bits(load_first(n - i, from + i)));
  }
  DLM_SIMD static Floats dot(Words a, Words b, Floats sum) {
    return fma(from_bits(a), from_bits(b), sum);
  }
};

#ifdef __AVX512BF16__
struct PairProducts {
  using Element = BFloat16;
  static constexpr int64_t kElements = 2;

  static bool are_words(const BFloat16* at, int64_t stride, int64_t D) {
    return reinterpret_cast<uintptr_t>(at) % 4 == 0 && stride % 2 == 0 && D % 2 == 0;
  }
  DLM_SIMD static void words(const BFloat16* from, int64_t n, uint32_t* to) {
    BFloat16 padded[2 * kWidth];
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
      const BFloat16* at = from + i;
      if (n - i < 2 * kWidth) {
        for (int64_t j = 0; j < 2 * kWidth; ++j) padded[j] = j < n - i ? at[j] : BFloat16{0};
        at = padded;
      }
      store(to + i / 2, load(reinterpret_cast<const uint32_t*>(at)));
    }
  }
  DLM_SIMD static Floats dot(Words a, Words b, Floats sum) { return dot_pairs(a, b, sum); }
};
#endif

template <class F>
int64_t words_of(int64_t D) {
  return (D + F::kElements - 1) / F::kElements;
}

template <class F>
void pack_as(const void* const* rows, int64_t D, int64_t lanes, uint32_t* to) {
  using T = typename F::Element;
  const int64_t words = words_of<F>(D);
  for (int64_t x = 0; x < lanes; x += kWidth) {
    for (int64_t w = 0; w < words; w += kWidth) {
      const int64_t first = w * F::kElements, n = std::min(D - first, kWidth * F::kElements);
      Words block[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) {
        uint32_t row[kWidth] = {};
        if (rows[x + r]) F::words(static_cast<const T*>(rows[x + r]) + first, n, row);
        block[r] = load(row);
      }
      transpose(block);
      const int64_t there = std::min<int64_t>(words - w, kWidth);
      for (int64_t i = 0; i < there; ++i) store(to + (w + i) * lanes + x, block[i]);
    }
  }
}

// Where a token's words are, and what to prefetch meanwhile: hardware does not prefetch rows that
// are far apart.
struct TokenWords {
  const uint32_t *at, *ahead;
};

// sums[t][lane] += the products of `depth` words, for kTokens tokens and kVectors vectors of lanes
// starting at `first_lane`, out of `lanes`. Words at even and at odd places have separate sums,
// whatever the template arguments, which shortens the chains of dependent operations.
template <class F, int kVectors, int kTokens>
DLM_SIMD void add_products(const uint32_t* a, int64_t lanes, int64_t first_lane,
                           const TokenWords* token, int64_t depth, float (*sums)[kGroup]) {
  Floats sum[2][kTokens][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; ++x) sum[0][t][x] = sum[1][t][x] = splat(0.0f);
  }
  a += first_lane;
  const auto add = [&](int64_t w, Floats(&to)[kTokens][kVectors]) __attribute__((always_inline)) {
    Words left[kVectors];
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; ++x) left[x] = load(a + w * lanes + x * kWidth);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const Words right = splat(token[t].at[w]);
#pragma GCC unroll 2
      for (int x = 0; x < kVectors; ++x) to[t][x] = F::dot(left[x], right, to[t][x]);
    }
  };
  constexpr int64_t kLine = 16;  // words per cache line
  int64_t w = 0;
  for (; w + kLine <= depth; w += kLine) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) __builtin_prefetch(token[t].ahead + w, 0, 2);
    for (int64_t i = w; i < w + kLine; i += 2) {
      add(i, sum[0]);
      add(i + 1, sum[1]);
    }
  }
  for (; w < depth; ++w) w % 2 == 0 ? add(w, sum[0]) : add(w, sum[1]);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; ++x) {
      float* to = sums[t] + first_lane + x * kWidth;
      store(to, load(to) + (sum[0][t][x] + sum[1][t][x]));
    }
  }
}

// The same for all tokens and lanes, with sixteen sums in registers at a time, or four where a
// vector takes two registers. (More tokens at a time, at a power-of-two distance, would evict one
// another.)
template <class F, int kVectors>
void add_all_products(const uint32_t* a, int64_t lanes, const TokenWords* token, int64_t depth,
                      float (*sums)[kGroup]) {
  constexpr int kTokens = (kManyRegisters ? 8 : 2) / kVectors;
  for (int64_t x = 0; x < lanes; x += kVectors * kWidth) {
    for (int t = 0; t < kHeadTokens; t += kTokens)
      add_products<F, kVectors, kTokens>(a, lanes, x, token + t, depth, sums + t);
  }
}

template <class T>
DLM_SIMD void store_logits(const float (*sums)[kGroup], int64_t first_lane, int64_t rows,
                           int64_t tokens, T* out, int64_t out_stride) {
  Words block[kHeadTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kHeadTokens; ++t) block[t] = bits(load(sums[t] + first_lane));
  transpose(block);
  for (int64_t r = 0; r < rows; ++r) store_first(tokens, out + r * out_stride, from_bits(block[r]));
}

template <class F>
void multiply_as(const uint32_t* packed, int64_t rows, const void* weight, int64_t stride,
                 int64_t tokens, int64_t D, void* out, int64_t out_stride) {
  using T = typename F::Element;
  const int64_t words = words_of<F>(D), groups = (rows + kGroup - 1) / kGroup;
  const T* first = static_cast<const T*>(weight);
  constexpr int64_t kNext = kHeadDepth * F::kElements;
  const bool direct = F::are_words(first, stride, D);
  float sums[kMostHeadRows / kGroup][kHeadTokens][kGroup] = {};
  alignas(64) uint32_t copied[kHeadTokens * kHeadDepth];
  for (int64_t w = 0; w < words; w += kHeadDepth) {
    const int64_t depth = std::min(words - w, kHeadDepth), element = w * F::kElements;
    TokenWords token[kHeadTokens];
    for (int64_t t = 0; t < kHeadTokens; ++t) {
      const int64_t own = std::min(t, tokens - 1);  // missing tokens repeat the last one
      const T* from = first + own * stride + element;
      const bool is_last =
          w + kHeadDepth >= words;  // then the first words of the next tokens follow
      const T* next = is_last ? from - element + kHeadTokens * stride : from + kNext;
      token[t] = {direct ? reinterpret_cast<const uint32_t*>(from) : copied + own * kHeadDepth,
                  reinterpret_cast<const uint32_t*>(next)};
      if (!direct && own == t)
        F::words(from, std::min(D - element, depth * F::kElements), copied + t * kHeadDepth);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t* a = packed + g * kGroup * words;
      if (rows - g * kGroup > kHeadLanes) {
        add_all_products<F, kManyRegisters ? 2 : 1>(a + w * kGroup, kGroup, token, depth, sums[g]);
      } else {
        add_all_products<F, 1>(a + w * kHeadLanes, kHeadLanes, token, depth, sums[g]);
      }
    }
  }
  for (int64_t r = 0; r < rows; r += kHeadLanes) {
    store_logits(sums[r / kGroup], r % kGroup, std::min<int64_t>(rows - r, kHeadLanes), tokens,
                 static_cast<T*>(out) + r * out_stride, out_stride);
  }
}

template <class F>
constexpr LmHeadKernels kernels_of() {
  return {words_of<F>, pack_as<F>, kHeadTokens, multiply_as<F>};
}

inline LmHeadKernels kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels_of<FloatProducts<BFloat16>>();
    case DType::kFloat16:
      return kernels_of<FloatProducts<Float16>>();
    default:
      return kernels_of<FloatProducts<float>>();
  }
}

}  // namespace
}  // namespace dlm::cpu::DLM_NAMESPACE
