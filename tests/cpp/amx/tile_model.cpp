// SPDX-License-Identifier: Apache-2.0
#include "amx/tile_model.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace amx {
namespace {

// Subnormal numbers are zero, coming and going, whatever MXCSR says.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float element(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flushed(x);
}
// sum + a * b, rounded once, to nearest even. In float64 the product is exact, and a sum of numbers
// of 16 and of 24 bits rounds to float32 as it would have at once.
float fma(float a, float b, float sum) {
  return flushed(float(double(a) * double(b) + double(flushed(sum))));
}

}  // namespace

const char* TileModel::unusable(int tile) const {
  if (!configured_) return "a tile is used without configuration";
  if (tile < 0 || tile >= kTiles) return "there is no such tile";
  if (rows_[tile] == 0) return "a tile is used that the configuration leaves out";
  return nullptr;
}

const char* TileModel::load_config(const void* from) {
  uint8_t bytes[64];
  memcpy(bytes, from, sizeof bytes);
  if (bytes[0] == 0) return release();
  if (bytes[0] != 1) return "configuration: there is no such palette";
  if (bytes[1] != 0) return "configuration: a start row, outside an interrupted load";
  int rows[16], row_bytes[16];
  for (int i = 2; i < 16; ++i) {
    if (bytes[i]) return "configuration: reserved bytes are not zero";
  }
  for (int i = 0; i < 16; ++i) {
    row_bytes[i] = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    rows[i] = bytes[48 + i];
    if (i >= kTiles && (rows[i] || row_bytes[i])) return "configuration: a ninth tile";
    if (rows[i] > kRows) return "configuration: a tile with more than 16 rows";
    if (row_bytes[i] > kRowBytes) return "configuration: a tile with rows of more than 64 bytes";
    if (!rows[i] != !row_bytes[i]) return "configuration: a tile with rows of no bytes, or none";
  }
  configured_ = true;
  memcpy(rows_, rows, sizeof rows_);
  memcpy(bytes_, row_bytes, sizeof bytes_);
  memset(data_, 0, sizeof data_);
  return nullptr;
}

const char* TileModel::release() {
  *this = TileModel();
  return nullptr;
}

const char* TileModel::zero(int tile) {
  if (const char* wrong = unusable(tile)) return wrong;
  memset(data_[tile], 0, sizeof data_[tile]);
  return nullptr;
}

const char* TileModel::load(int tile, const void* from, int64_t stride) {
  if (const char* wrong = unusable(tile)) return wrong;
  memset(data_[tile], 0, sizeof data_[tile]);  // beyond the configured part
  for (int row = 0; row < rows_[tile]; ++row) {
    memcpy(data_[tile][row], static_cast<const char*>(from) + row * stride, size_t(bytes_[tile]));
  }
  return nullptr;
}

const char* TileModel::store(int tile, void* to, int64_t stride) const {
  if (const char* wrong = unusable(tile)) return wrong;
  for (int row = 0; row < rows_[tile]; ++row) {
    memcpy(static_cast<char*>(to) + row * stride, data_[tile][row], size_t(bytes_[tile]));
  }
  return nullptr;
}

const char* TileModel::dot(int sums, int a, int b) {
  for (const int tile : {sums, a, b}) {
    if (const char* wrong = unusable(tile)) return wrong;
    if (bytes_[tile] % 4) return "a product of tiles whose rows are no whole words";
  }
  if (sums == a || sums == b || a == b) return "a product of a tile with itself";
  if (rows_[sums] != rows_[a] || bytes_[sums] != bytes_[b] || bytes_[a] != rows_[b] * 4) {
    return "a product of tiles that do not fit";
  }
  const int depth = rows_[b], columns = bytes_[b] / 4;
  float first[kRows], second[kRows], right_first[kRows][kRows], right_second[kRows][kRows];
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) {
      uint32_t word;
      memcpy(&word, data_[b][k] + 4 * n, 4);
      right_first[k][n] = element(word, 0), right_second[k][n] = element(word, 1);
    }
  }
  for (int m = 0; m < rows_[a]; ++m) {
    for (int n = 0; n < columns; ++n) first[n] = second[n] = 0;
    for (int k = 0; k < depth; ++k) {
      uint32_t word;
      memcpy(&word, data_[a][m] + 4 * k, 4);
      const float left_first = element(word, 0), left_second = element(word, 1);
      for (int n = 0; n < columns; ++n) {
        first[n] = fma(left_first, right_first[k][n], first[n]);
        second[n] = fma(left_second, right_second[k][n], second[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      memcpy(&sum, data_[sums][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(first[n] + second[n]));
      memcpy(data_[sums][m] + 4 * n, &sum, 4);
    }
  }
  return nullptr;
}

}  // namespace amx
