// SPDX-License-Identifier: Apache-2.0
// Weights and sums of soft_embedding (see soft_embedding.cpp) with AVX-512F, BW, DQ and VL. Sums of
// 64 ids stay in registers: of 32 columns for eight rows, of all 256 for one. With eight rows fused
// operations are the limit, two for each id and row; with one it is memory.
#include "cpu/simd_avx512.h"
#include "cpu/soft_embedding.h"

namespace dlm::cpu::avx512 {
namespace {

constexpr float kLargest = 3.402823466e+38f;

template <class L>
DLM_SIMD uint64_t weights_as(const SoftRow& row, int64_t begin, int n, float* weight) {
  const L* logits = static_cast<const L*>(row.logits) + begin;
  const Floats top = splat(row.max), scale = splat(row.inverse * 1.44269504f);
  uint64_t kept = 0;
  for (int i = 0; i < kSoftIds; i += kWidth) {
    const Mask inside = first(n > i ? n - i : 0);
    const Floats z = min(splat(kLargest), load(inside, logits + i));  // a NaN stays
    const Floats w = exp2_nonpositive((z - top) * scale);
    const Mask sound = at_least(z, splat(row.floor)) & inside;
    const Mask weighs = inside & Mask(~is_nan(z));
    store(weight + i, select(weighs, w, splat(0.0f)));
    kept |= uint64_t(sound) << i;
  }
  return kept;
}

// One to eight rows; of those that are not there nobody reads the sums. kVectors of columns at a
// time, so that the sums fill half of the registers.
template <class T, int kRows, int kVectors = 16 / kRows>
DLM_SIMD void add_rows(const T* table, int64_t stride, int n, int columns,
                       const float (*weight)[kSoftIds], double (*sums)[kSoftColumns]) {
  for (int d = 0; d < columns; d += kVectors * kWidth) {
    Mask inside[kVectors];
    Floats sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      const int before = columns - d - j * kWidth;
      inside[j] = first(before > 0 ? before : 0);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][j] = splat(0.0f);
    }
    const T* e = table + d;
    for (int i = 0; i < n; ++i, e += stride) {
      Floats w[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) w[r] = splat(weight[r][i]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const Floats x = load(inside[j], e + j * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][j] = fma(w[r], x, sum[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (d + j * kWidth < kSoftColumns) add_to(sums[r] + d + j * kWidth, sum[r][j]);
      }
    }
  }
}

template <class T>
DLM_SIMD void add_as(const void* table, int64_t stride, int n, int columns,
                     const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]) {
  const T* e = static_cast<const T*>(table);
  if (rows == 1) return add_rows<T, 1>(e, stride, n, columns, weight, sums);
  if (rows == 2) return add_rows<T, 2>(e, stride, n, columns, weight, sums);
  // Rows of E that are a power of two apart would meet in a few sets of the cache when read again
  // for every two vectors of columns and eight rows: they are copied next to each other, as floats.
  constexpr int kStride = kSoftColumns + kWidth;
  float packed[kSoftIds * kStride];
  for (int i = 0; i < n; ++i, e += stride) {
    for (int d = 0; d < columns; d += kWidth)
      store(packed + i * kStride + d, load(first(columns - d), e + d));
  }
  for (int r = 0; r < rows; r += 8)
    add_rows<float, 8>(packed, kStride, n, columns, weight + r, sums + r);
}

}  // namespace

uint64_t soft_weights(const SoftRow& row, DType dtype, int64_t begin, int n, float* weight) {
  switch (dtype) {
    case DType::kFloat32:
      return weights_as<float>(row, begin, n, weight);
    case DType::kBFloat16:
      return weights_as<BFloat16>(row, begin, n, weight);
    default:
      return weights_as<Float16>(row, begin, n, weight);
  }
}

void soft_add(const void* e, DType dtype, int64_t stride, int n, int columns,
              const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]) {
  switch (dtype) {
    case DType::kFloat32:
      return add_as<float>(e, stride, n, columns, weight, rows, sums);
    case DType::kBFloat16:
      return add_as<BFloat16>(e, stride, n, columns, weight, rows, sums);
    default:
      return add_as<Float16>(e, stride, n, columns, weight, rows, sums);
  }
}

}  // namespace dlm::cpu::avx512
