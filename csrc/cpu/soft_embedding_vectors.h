// SPDX-License-Identifier: Apache-2.0
// Weights and sums of soft_embedding (see soft_embedding.cpp) in vectors: each file for one
// instruction set includes this after its simd_*.h. Sums over 64 ids stay in registers, for up to
// kRows rows at a time. With many rows fused operations are the limit (one per id, row and vector),
// with one row it is memory.
#pragma once
#include <algorithm>

#include "cpu/soft_embedding.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

constexpr float kLargest = 3.402823466e+38f;
constexpr int kSums = kManyRegisters ? 16 : 4;  // vectors of sums: half of the registers
constexpr int kRows = kManyRegisters ? 8 : 4;

template <class L>
DLM_SIMD uint64_t weights_as(const SoftRow& row, int64_t begin, int n, float* weight) {
  const L* logits = static_cast<const L*>(row.logits) + begin;
  const Floats top = splat(row.max), scale = splat(row.inverse * 1.44269504f), zero = splat(0.0f);
  uint64_t kept = 0;
  for (int i = 0; i < kSoftIds; i += kWidth) {
    const int there = std::max(n - i, 0);
    const Floats z = min(splat(kLargest), load_first(there, logits + i));  // NaN stays NaN
    const Floats w = exp2_nonpositive((z - top) * scale);
    const Mask inside = first(there);
    store(weight + i, select(inside, select(is_nan(z), zero, w), zero));
    kept |= uint64_t(to_bits(at_least(z, splat(row.floor))) & to_bits(inside)) << i;
  }
  return kept;
}

// Prefetches the same columns of the next 64 ids: rows of E are far apart, so hardware does not
// prefetch them. (Prefetching beyond the end of E has no effect.)
template <class T, int kStep>
DLM_SIMD void fetch_next(const T* e, int64_t stride) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(e) + kSoftIds * stride * sizeof(T);
  for (uintptr_t line = 0; line < kStep * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, 2);
  }
}

// Processes some rows and kVectors vectors of columns, of which `columns` exist.
template <class T, int kRowsAtOnce, int kVectors, bool kWhole, bool kFetch = true>
DLM_SIMD void add_rows(const T* e, int64_t stride, int n, int columns,
                       const float (*weight)[kSoftIds], double (*sums)[kSoftColumns], int column) {
  Floats sum[kRowsAtOnce][kVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kRowsAtOnce; ++r) sum[r][j] = splat(0.0f);
  }
  for (int i = 0; i < n; ++i, e += stride) {
    if (kFetch) fetch_next<T, kVectors * kWidth>(e, stride);
    Floats w[kRowsAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < kRowsAtOnce; ++r) w[r] = splat(weight[r][i]);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      const T* from = e + j * kWidth;
      const Floats x = kWhole ? load(from) : load_first(std::max(columns - j * kWidth, 0), from);
#pragma GCC unroll 8
      for (int r = 0; r < kRowsAtOnce; ++r) sum[r][j] = fma(w[r], x, sum[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (j * kWidth < columns) add_to(sums[r] + column + j * kWidth, sum[r][j]);
    }
  }
}

// Processes one or two rows, whose sums fill the registers: E is read in place.
template <class T, int kRowsAtOnce>
DLM_SIMD void add_few(const T* e, int64_t stride, int n, int columns,
                      const float (*weight)[kSoftIds], double (*sums)[kSoftColumns]) {
  constexpr int kVectors = kSums / kRowsAtOnce, kStep = kVectors * kWidth;
  int d = 0;
  for (; d + kStep <= columns; d += kStep) {
    add_rows<T, kRowsAtOnce, kVectors, true>(e + d, stride, n, kStep, weight, sums, d);
  }
  if (d < columns) {
    add_rows<T, kRowsAtOnce, kVectors, false>(e + d, stride, n, columns - d, weight, sums, d);
  }
}

// Processes more rows. Rows that do not exist have no weight, and their sums are not used. A few
// columns of E are copied next to each other as floats, so that they stay in the first-level cache
// for all rows. (Rows of E at a power-of-two distance would evict one another.)
template <class T>
DLM_SIMD void add_many(const T* e, int64_t stride, int n, int columns,
                       const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]) {
  constexpr int kVectors = kSums / kRows, kStep = kVectors * kWidth;
  float packed[kSoftIds * kStep];
  for (int d = 0; d < columns; d += kStep) {
    const int there = columns - d;
    const T* from = e + d;
    for (int i = 0; i < n; ++i, from += stride) {
      fetch_next<T, kStep>(from, stride);
      for (int x = 0; x < kStep; x += kWidth) {
        store(packed + i * kStep + x, load_first(std::max(there - x, 0), from + x));
      }
    }
    for (int r = 0; r < rows; r += kRows) {
      add_rows<float, kRows, kVectors, true, false>(packed, kStep, n, there, weight + r, sums + r,
                                                    d);
    }
  }
}

template <class T>
DLM_SIMD void add_as(const void* table, int64_t stride, int n, int columns,
                     const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]) {
  const T* e = static_cast<const T*>(table);
  if (rows == 1) return add_few<T, 1>(e, stride, n, columns, weight, sums);
  if (rows == 2) return add_few<T, 2>(e, stride, n, columns, weight, sums);
  add_many(e, stride, n, columns, weight, rows, sums);
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

}  // namespace dlm::cpu::DLM_NAMESPACE
