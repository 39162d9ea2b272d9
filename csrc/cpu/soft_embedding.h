// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <limits>

#include "common/params.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// Work items. Rows with a floor: one row each. Other rows: tiles of kSoftRows rows by kSoftColumns
// columns, columns first.
constexpr int kSoftRows = 32, kSoftColumns = 256;
int64_t soft_embedding_items(const SoftEmbeddingParams& p);
void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end);
// The instruction set whose kernels are used when `isa` is in use.
Isa soft_embedding_isa(Isa isa);

// --- the kernels of an instruction set, and their arguments --------------------------------------

constexpr int kSoftIds = 64;  // ids of the vocabulary processed at a time

// One row of logits as weights e^((z - max) / T).
struct SoftRow {
  const void* logits = nullptr;  // null: no id has weight
  float max = 0.0f, inverse = 1.0f, floor = -std::numeric_limits<float>::infinity();
};

// Writes the weights of ids [begin, begin + n), with n at most kSoftIds, and zeros up to kSoftIds.
// Returns a bit for each id that is at or above the floor.
using WeightsKernel = uint64_t (*)(const SoftRow& row, DType dtype, int64_t begin, int n,
                                   float* weight);

// sums[r][d] += the sum over i of weight[r][i] * e[i][d], for `rows` of kSoftRows rows, n of
// kSoftIds ids, and `columns` of kSoftColumns columns. `e` points to the element of the first id
// and column.
using AddKernel = void (*)(const void* e, DType dtype, int64_t stride, int n, int columns,
                           const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]);

namespace generic {
uint64_t soft_weights(const SoftRow& row, DType dtype, int64_t begin, int n, float* weight);
void soft_add(const void* e, DType dtype, int64_t stride, int n, int columns,
              const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]);
}  // namespace generic

namespace avx2 {
uint64_t soft_weights(const SoftRow& row, DType dtype, int64_t begin, int n, float* weight);
void soft_add(const void* e, DType dtype, int64_t stride, int n, int columns,
              const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]);
}  // namespace avx2

namespace avx512 {
uint64_t soft_weights(const SoftRow& row, DType dtype, int64_t begin, int n, float* weight);
void soft_add(const void* e, DType dtype, int64_t stride, int n, int columns,
              const float (*weight)[kSoftIds], int rows, double (*sums)[kSoftColumns]);
}  // namespace avx512

}  // namespace dlm::cpu
