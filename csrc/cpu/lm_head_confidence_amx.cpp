// SPDX-License-Identifier: Apache-2.0
// Products of bf16 hidden states and an LM head in tile registers (see lm_head_confidence.cpp and
// simd_amx.h). Hidden states are packed as for AVX512_BF16, sixteen words at a time. Weights are
// read in place, one tile from the rows of sixteen tokens. A sum takes one block of 32 elements of
// D after the other, with separate sums for even and odd blocks, so its bits depend only on its row
// and token.
#include "cpu/simd_avx512.h"
#define DLM_NAMESPACE avx512
#include "cpu/lm_head_confidence_vectors.h"
#include "cpu/simd_amx.h"

namespace dlm::cpu::amx {
namespace {

using avx512::load, avx512::store, avx512::kGroup;
using Pairs = avx512::PairProducts;

static_assert(kHeadTokens == kTile && kHeadLanes == kTile && kHeadDepth % (2 * kTile) == 0);

// Number of words, rounded up to whole tiles.
int64_t words(int64_t D) { return (avx512::words_of<Pairs>(D) + kTile - 1) / kTile * kTile; }

void pack(const void* const* rows, int64_t D, int64_t lanes, uint32_t* to) {
  avx512::pack_as<Pairs>(rows, D, lanes, to);
  std::fill(to + avx512::words_of<Pairs>(D) * lanes, to + words(D) * lanes, 0u);
}

// Sums of a group of rows: of the even blocks of 32 elements, then of the odd ones.
struct alignas(64) GroupSums {
  float at[2 * kTile * kGroup];
};

// Up to kHeadDepth words of sixteen tokens, whose rows are `bytes` apart.
struct Weights {
  const char* at;
  int64_t bytes, depth;
};

template <int kVectors>
void add_group(const uint32_t* packed, const Weights& b, bool first, float* sums) {
  first ? zero_sums<kVectors>() : load_sums<kVectors>(sums);
  int64_t w = 0;
  for (; w + 2 * kTile <= b.depth; w += 2 * kTile)
    add_products_in_turn<kVectors, true>(packed + w * kVectors * kTile, b.at + w * 4, b.bytes);
  if (w < b.depth)
    add_products_in_turn<kVectors, false>(packed + w * kVectors * kTile, b.at + w * 4, b.bytes);
  store_sums<kVectors>(sums);
}

template <int kVectors>
void store_group(const float* sums, int64_t rows, int64_t tokens, BFloat16* out,
                 int64_t out_stride) {
  float logits[kTile][kGroup];
  for (int64_t t = 0; t < kTile; ++t) {
    for (int64_t x = 0; x < kVectors * kTile; x += kTile) {
      const float* even = sums + t * kVectors * kTile + x;
      store(logits[t] + x, load(even) + load(even + kTile * kVectors * kTile));
    }
  }
  for (int64_t r = 0; r < rows; r += kTile) {
    avx512::store_logits(logits, r, std::min<int64_t>(rows - r, kTile), tokens,
                         out + r * out_stride, out_stride);
  }
}

// Multiplies sixteen tokens or fewer.
class Sixteen {
 public:
  Sixteen(const BFloat16* weight, int64_t stride, int64_t tokens, int64_t D)
      : weight_(weight), stride_(stride), tokens_(tokens), D_(D), words_(words(D)) {}

  void run(const uint32_t* packed, int64_t rows, BFloat16* out, int64_t out_stride) {
    GroupSums sums[kMostHeadRows / kGroup];
    const auto each_group = [&](auto visit) {
      for (int64_t g = 0; g * kGroup < rows; ++g) visit(g, std::min(rows - g * kGroup, kGroup));
    };
    int64_t w = 0;
    do {  // at least once, so that the sums are defined
      const Weights b = weights(w);
      ask_for(w + kHeadDepth < words_ ? w + kHeadDepth : 0, w + kHeadDepth >= words_);
      each_group([&](int64_t g, int64_t n) {
        const uint32_t* a = packed + g * kGroup * words_;
        float* to = sums[g].at;
        n > kTile ? add_group<2>(a + w * kGroup, b, w == 0, to)
                  : add_group<1>(a + w * kTile, b, w == 0, to);
      });
      w += kHeadDepth;
    } while (w < words_);
    each_group([&](int64_t g, int64_t n) {
      BFloat16* to = out + g * kGroup * out_stride;
      n > kTile ? store_group<2>(sums[g].at, n, tokens_, to, out_stride)
                : store_group<1>(sums[g].at, n, tokens_, to, out_stride);
    });
  }

 private:
  // Weights from word w on: in memory, or a zero-padded copy if tokens or elements are missing.
  Weights weights(int64_t w) {
    const int64_t depth = std::min(words_ - w, kHeadDepth), first = 2 * w;
    if (tokens_ == kTile && first + 2 * depth <= D_)
      return {reinterpret_cast<const char*>(weight_ + first), stride_ * 2, depth};
    std::fill_n(copied_, kTile * kHeadDepth, 0u);
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t n = std::min(D_ - first, 2 * depth);
      if (n > 0)
        std::memcpy(copied_ + t * kHeadDepth, weight_ + t * stride_ + first, size_t(2 * n));
    }
    return {reinterpret_cast<const char*>(copied_), kHeadDepth * 4, depth};
  }

  // Prefetches the next words, those of the following tokens if these have no more. Hardware does
  // not prefetch rows that are far apart.
  void ask_for(int64_t w, bool of_next_tokens) const {
    constexpr int64_t kLine = 32;  // elements
    const BFloat16* from = weight_ + (of_next_tokens ? kTile * stride_ : 0) + 2 * w;
    const int64_t n = std::min(D_ - 2 * w, 2 * kHeadDepth);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + t * stride_ + i, 0, 2);
    }
  }

  const BFloat16* const weight_;
  const int64_t stride_, tokens_, D_, words_;
  alignas(64) uint32_t copied_[kTile * kHeadDepth];
};

void multiply(const uint32_t* packed, int64_t rows, const void* weight, int64_t stride,
              int64_t tokens, int64_t D, void* out, int64_t out_stride) {
  const Tiles tiles;
  for (int64_t t = 0; t < tokens; t += kTile) {
    Sixteen(static_cast<const BFloat16*>(weight) + t * stride, stride,
            std::min<int64_t>(tokens - t, kTile), D)
        .run(packed, rows, static_cast<BFloat16*>(out) + t, out_stride);
  }
}

}  // namespace

LmHeadKernels lm_head_confidence(DType dtype) {
  // Tiles are configured once per chunk of the vocabulary.
  return dtype == DType::kBFloat16 ? LmHeadKernels{words, pack, kRaceChunk, multiply}
                                   : avx512::lm_head_confidence(dtype);
}

}  // namespace dlm::cpu::amx
