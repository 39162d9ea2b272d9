// SPDX-License-Identifier: Apache-2.0
// A model of the tile registers and the instructions on them that the library uses: palette 1, as
// the operation sections of Intel's Architecture Instruction Set Extensions Programming Reference
// (319433, chapter 3) define them. What would fault on a processor is returned as text; null: done.
#pragma once
#include <cstdint>

namespace amx {

class TileModel {
 public:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

  const char* load_config(const void* from);  // 64 bytes
  const char* release();
  const char* zero(int tile);
  const char* load(int tile, const void* from, int64_t stride);  // in bytes
  const char* store(int tile, void* to, int64_t stride) const;
  // sums[m][n] += over pairs k of bf16: a[m][k] * b[k][n]
  const char* dot(int sums, int a, int b);

  bool configured() const { return configured_; }

 private:
  const char* unusable(int tile) const;

  bool configured_ = false;
  int rows_[kTiles] = {}, bytes_[kTiles] = {};
  alignas(64) uint8_t data_[kTiles][kRows][kRowBytes] = {};
};

}  // namespace amx
