// SPDX-License-Identifier: Apache-2.0
// Weights and sums of soft_embedding (see soft_embedding.cpp) in plain C++, written for
// vectorizers.
#include <algorithm>

#include "common/math.h"
#include "cpu/soft_embedding.h"

namespace dlm::cpu::generic {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

template <class L>
uint64_t weights_as(const SoftRow& row, int64_t begin, int n, float* weight) {
  const L* logits = static_cast<const L*>(row.logits) + begin;
  float z[kSoftIds];
  for (int i = 0; i < n; ++i) {
    z[i] = to_float(logits[i]);
    z[i] = z[i] > kLargest ? kLargest : z[i];
  }
  for (int i = n; i < kSoftIds; ++i) z[i] = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < kSoftIds; ++i) weight[i] = exp_normal((z[i] - row.max) * row.inverse);
  uint64_t kept = 0;
  for (int i = 0; i < n; ++i) kept |= uint64_t(z[i] >= row.floor) << i;
  return kept;
}

template <class T>
void add_as(const void* table, int64_t stride, int n, int columns, const float (*weight)[kSoftIds],
            int rows, double (*sums)[kSoftColumns]) {
  const T* e = static_cast<const T*>(table);
  float sum[kSoftRows][kSoftColumns];
  for (int r = 0; r < rows; ++r) std::fill_n(sum[r], kSoftColumns, 0.0f);
  for (int i = 0; i < n; ++i, e += stride) {
    float x[kSoftColumns];
    for (int d = 0; d < columns; ++d) x[d] = to_float(e[d]);
    for (int r = 0; r < rows; ++r) {
      const float w = weight[r][i];
      if (columns == kSoftColumns) {  // a constant length makes tighter loops
        for (int d = 0; d < kSoftColumns; ++d) sum[r][d] += w * x[d];
      } else {
        for (int d = 0; d < columns; ++d) sum[r][d] += w * x[d];
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int d = 0; d < columns; ++d) sums[r][d] += double(sum[r][d]);
  }
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

}  // namespace dlm::cpu::generic
