// SPDX-License-Identifier: Apache-2.0
// The tile registers for *_amx.cpp: one product of bf16 pairs, 32 outputs by one or two vectors of
// rows. Needs AMX-TILE and AMX-BF16 (Intel, Architecture Instruction Set Extensions Programming
// Reference, 319433, chapter 3), and permission from the system, which isa.cpp requests.
#pragma once
#include <immintrin.h>

#include "cpu/simd_avx512.h"

namespace dlm::cpu::amx {

// Number of rows of a tile, and of its columns, which are 32-bit words.
constexpr int kTile = 16;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileShapes) == 64, "as LDTILECFG reads it");
constexpr TileShapes kWholeTiles;

// Configures all eight tiles in full size for this thread during its lifetime, and none afterwards,
// so that the system does not have to save them.
class Tiles {
 public:
  DLM_SIMD Tiles() { _tile_loadconfig(&kWholeTiles); }
  DLM_SIMD ~Tiles() { _tile_release(); }
};

// c[n][rows] += a[i][rows] * b[n][i] in tiles. Tiles 0 to 3 are sums (0 and 1: the first sixteen n
// with vectors 0 and 1; 2 and 3: the second sixteen n), 4 and 5 hold b, 6 and 7 hold a. A row of a
// and of c is kVectors vectors. The intrinsics accept only literal tile numbers, and GCC's do not
// declare which memory they access, hence the barriers.
DLM_SIMD void tile_barrier() { __asm__ volatile("" ::: "memory"); }

template <int kVectors>
DLM_SIMD void zero_sums() {
  _tile_zero(0);
  _tile_zero(2);
  if (kVectors == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}
template <int kVectors>
DLM_SIMD void load_sums(const float* c) {
  constexpr int64_t kStride = kVectors * kTile;
  tile_barrier();
  _tile_loadd(0, c, kStride * 4);
  _tile_loadd(2, c + kTile * kStride, kStride * 4);
  if (kVectors == 2) {
    _tile_loadd(1, c + kTile, kStride * 4);
    _tile_loadd(3, c + kTile * kStride + kTile, kStride * 4);
  }
}
template <int kVectors>
DLM_SIMD void store_sums(float* c) {
  constexpr int64_t kStride = kVectors * kTile;
  _tile_stored(0, c, kStride * 4);
  _tile_stored(2, c + kTile * kStride, kStride * 4);
  if (kVectors == 2) {
    _tile_stored(1, c + kTile, kStride * 4);
    _tile_stored(3, c + kTile * kStride + kTile, kStride * 4);
  }
  tile_barrier();
}
// Over sixteen words i; the rows of b are b_out words apart.
template <int kVectors>
DLM_SIMD void add_products(const uint32_t* a, const uint32_t* b, int64_t b_out) {
  constexpr int64_t kStride = kVectors * kTile;
  tile_barrier();
  _tile_loadd(4, b, b_out * 4);
  _tile_loadd(6, a, kStride * 4);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, b + kTile * b_out, b_out * 4);
  _tile_dpbf16ps(2, 5, 6);
  if (kVectors == 2) {
    _tile_loadd(7, a + kTile, kStride * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The same for sixteen n, over 32 words i, or over the first sixteen if `both` is false. The first
// sixteen words go to the sums of the first sixteen n, the others to separate sums in the place of
// the second sixteen n, so that twice as many instructions do not depend on earlier ones.
template <int kVectors, bool both>
DLM_SIMD void add_products_in_turn(const uint32_t* a, const void* b, int64_t b_bytes) {
  constexpr int64_t kStride = kVectors * kTile;
  tile_barrier();
  _tile_loadd(4, b, b_bytes);
  _tile_loadd(6, a, kStride * 4);
  _tile_dpbf16ps(0, 4, 6);
  if (kVectors == 2) {
    _tile_loadd(7, a + kTile, kStride * 4);
    _tile_dpbf16ps(1, 4, 7);
  }
  if (!both) return;
  a += kTile * kStride;
  _tile_loadd(5, static_cast<const char*>(b) + kTile * 4, b_bytes);
  _tile_loadd(6, a, kStride * 4);
  _tile_dpbf16ps(2, 5, 6);
  if (kVectors == 2) {
    _tile_loadd(7, a + kTile, kStride * 4);
    _tile_dpbf16ps(3, 5, 7);
  }
}

}  // namespace dlm::cpu::amx
