// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory, and their products on tensor cores (mma.m16n8k16, ldmatrix: sm_80).
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

// Byte offset of a 16-byte chunk in a tile whose rows have `chunks` of them, a multiple of 8. The
// same chunk of eight rows, and eight chunks of one row, are in different banks.
template <int chunks>
DLM_DEVICE uint32_t chunk_offset(int row, int chunk) {
  return uint32_t(row * chunks * 16 + chunk / 8 * 128 + ((chunk ^ row) & 7) * 16);
}

// The same offset in two parts, so that unrolled loops over constant even chunks need only one
// address: the place of a row's first chunk, or with `odd` of its second; and from there, the place
// `chunk` chunks on.
template <int chunks>
DLM_DEVICE uint32_t row_start(uint32_t tile, int row, int odd) {
  return tile + uint32_t(row * chunks * 16 + ((row ^ odd) & 7) * 16);
}
DLM_DEVICE uint32_t chunk_from(uint32_t start, int chunk) {
  return (start ^ uint32_t((chunk & 7) * 16)) + uint32_t(chunk / 8 * 128);
}

// --- words of elements -------------------------------------------------------------------------

template <class T>
DLM_DEVICE uint32_t pack(float low, float high) {
  return std::is_same_v<T, BFloat16> ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}

DLM_DEVICE uint4 as_words(float a, float b, float c, float d) {
  return make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d));
}
DLM_DEVICE float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// --- products ----------------------------------------------------------------------------------

template <class T>
DLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
}

// Sums of a warp's product, in blocks of 16 rows and of 8 columns. A lane holds rows lane/4 and
// lane/4 + 8 of a block of 16, and of every 8 columns 2 (lane%4) and the next.
template <int kBlocks16, int kTiles8>
using Scores = float[kBlocks16][kTiles8][4];

// s += q k^T for 16 * kBlocks16 rows of q starting at `row` and 8 * kTiles8 rows of k starting at
// `key`, in tiles of kD columns. A sum takes 16 columns after the other, independently of the other
// sums.
template <class T, int kD, int kBlocks16, int kTiles8>
DLM_DEVICE void multiply_tiles(Scores<kBlocks16, kTiles8>& s, uint32_t queries, int row,
                               uint32_t k_tile, int key) {
  constexpr int kChunks = kD / 8;
  constexpr uint32_t k16Rows = 16 * kD * 2;  // bytes
  const int lane = int(threadIdx.x) % 32;
  const uint32_t q_row = row_start<kChunks>(queries, row + lane % 16, lane / 16);
  const auto load_q = [&](uint32_t (&q)[kBlocks16][4], int d) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
      ptx::ldmatrix(q[i], chunk_from(q_row, d * 2) + i * k16Rows);
    }
  };
  if constexpr (kTiles8 == 1) {  // one load of k has 8 rows and 32 columns
    const uint32_t k_row = row_start<kChunks>(k_tile, key + lane % 8, lane / 8);
#pragma unroll
    for (int d = 0; d < kD / 32; ++d) {
      uint32_t k[4];
      ptx::ldmatrix(k, chunk_from(k_row, d * 4));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t q[kBlocks16][4];
        load_q(q, d * 2 + half);
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) mma<T>(s[i][0], q[i], k[half * 2], k[half * 2 + 1]);
      }
    }
  } else {  // 16 rows and 16 columns
    const uint32_t k_row = row_start<kChunks>(k_tile, key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t q[kBlocks16][4];
      load_q(q, d);
#pragma unroll
      for (int j = 0; j < kTiles8 / 2; ++j) {
        uint32_t k[4];
        ptx::ldmatrix(k, chunk_from(k_row, d * 2) + j * k16Rows);
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
          mma<T>(s[i][j * 2], q[i], k[0], k[1]);
          mma<T>(s[i][j * 2 + 1], q[i], k[2], k[3]);
        }
      }
    }
  }
}

}  // namespace dlm::cuda
