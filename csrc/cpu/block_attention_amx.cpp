// SPDX-License-Identifier: Apache-2.0
// Block attention in bf16 with AMX: both products of block_attention_vectors.h run in tile
// registers, for any number of rows. A row's bits therefore do not depend on how many rows
// accompany it: a tile instruction sums even and odd elements separately, which no vector
// instruction does. Everything else is AVX-512.
#include "cpu/block_attention_avx512.h"
#include "cpu/simd_amx.h"

namespace dlm::cpu::amx {
namespace {

using avx512::Ahead, avx512::Words, avx512::kLanes;
using avx512::interleave, avx512::load, avx512::max_halves, avx512::store, avx512::transpose;

struct TileWords : avx512::PairWords {
  static constexpr bool kTiles = true;

  // Keys are always packed: sixteen rows of a cache at a power-of-two distance would evict one
  // another.
  static bool are_words(const BFloat16*, int64_t) { return false; }

  // The values of 32 slots: their sixteen words are adjacent, one element of D after the other.
  static void values(const BFloat16* const* row, int64_t n, uint32_t* to, Words* worst) {
    for (int64_t d = 0; d < n; d += 2 * kLanes, to += 2 * kLanes * kTile) {
      Words low[kTile], high[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        interleave(words(row[2 * i] + d, (n - d) / 2), words(row[2 * i + 1] + d, (n - d) / 2),
                   &low[i], &high[i]);
        *worst = max_halves(*worst, max_halves(low[i] & 0x7fff7fffu, high[i] & 0x7fff7fffu));
      }
      transpose(low);
      transpose(high);
      for (int64_t i = 0; i < kTile; ++i) {
        store(to + i * kTile, low[i]);
        store(to + (kLanes + i) * kTile, high[i]);
      }
    }
  }

  // Like avx512::multiply_all, in blocks of 32 outputs and sixteen words of depth.
  template <int kVectors>
  static void multiply(const uint32_t* a, const uint32_t* b, int64_t b_out, int64_t b_in,
                       int64_t depth, const float* before, float* c, int64_t count, Ahead* ahead) {
    constexpr int64_t kStride = kVectors * kLanes, kOut = 2 * kTile;
    // Cache lines prefetched at a time: the rows of a key tile arrive within one product.
    constexpr int kLines = 32;
    Ahead next = *ahead;
    for (int64_t i = 0; before && i < count * kStride; i += kStride) {
      for (int64_t x = 0; x < kStride; x += kLanes) {
        store(c + i + x, load(c + i + x) * load(before + x));
      }
    }
    for (int64_t n = 0; n < count; n += kOut) {
      float* sums = c + n * kStride;
      before ? load_sums<kVectors>(sums) : zero_sums<kVectors>();
      for (int64_t i = 0; i < depth; i += kTile) {
        for (int line = 0; line < kLines && next.rows > 0; ++line) next.step();
        add_products<kVectors>(a + i * kStride, b + n * b_out + i * b_in, b_out);
      }
      store_sums<kVectors>(sums);
    }
    *ahead = next;
  }
};

template <class F>
void attend(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  const Tiles tiles;
  avx512::attend<F>(p, begin, end);
}

template <class F>
constexpr BlockAttentionKernels kernels_of() {
  return {avx512::work<F>, attend<F>, avx512::merge_spans<F>, avx512::kGrain};
}

}  // namespace

BlockAttentionKernels block_attention(DType dtype) {
  return dtype == DType::kBFloat16 ? kernels_of<TileWords>() : avx512::block_attention(dtype);
}

}  // namespace dlm::cpu::amx
