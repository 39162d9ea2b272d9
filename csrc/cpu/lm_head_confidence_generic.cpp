// SPDX-License-Identifier: Apache-2.0
// Products of hidden states and an LM head (see lm_head_confidence.cpp) in plain C++, written for
// vectorizers: the innermost loop runs over rows.
#include <algorithm>

#include "cpu/lm_head_confidence.h"

namespace dlm::cpu::generic {
namespace {

constexpr int64_t kGroup = 2 * kHeadLanes;

int64_t words(int64_t D) { return D; }

template <class T>
void pack_as(const void* const* rows, int64_t D, int64_t lanes, uint32_t* to) {
  for (int64_t r = 0; r < lanes; ++r) {
    const T* row = static_cast<const T*>(rows[r]);
    for (int64_t d = 0; d < D; ++d) to[d * lanes + r] = row ? float_to_bits(to_float(row[d])) : 0;
  }
}

// sums[lane] of one token, over D in ascending order, kHeadDepth elements at a time.
template <class T, int kLanes>
void add_products(const uint32_t* packed, const T* token, int64_t D, float* sums) {
  std::fill_n(sums, kLanes, 0.0f);
  for (int64_t begin = 0; begin < D; begin += kHeadDepth) {
    float part[kLanes] = {};
    for (int64_t d = begin; d < std::min(begin + kHeadDepth, D); ++d) {
      const float weight = to_float(token[d]);
      for (int r = 0; r < kLanes; ++r) part[r] += bits_to_float(packed[d * kLanes + r]) * weight;
    }
    for (int r = 0; r < kLanes; ++r) sums[r] += part[r];
  }
}

template <class T>
void multiply_as(const uint32_t* packed, int64_t rows, const void* weight, int64_t stride,
                 int64_t tokens, int64_t D, void* out, int64_t out_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* token = static_cast<const T*>(weight) + t * stride;
    for (int64_t first = 0; first < rows; first += kGroup) {
      const int64_t n = std::min(rows - first, kGroup);
      float sums[kGroup];
      n > kHeadLanes ? add_products<T, kGroup>(packed + first * D, token, D, sums)
                     : add_products<T, kHeadLanes>(packed + first * D, token, D, sums);
      for (int64_t r = 0; r < n; ++r)
        static_cast<T*>(out)[(first + r) * out_stride + t] = from_float<T>(sums[r]);
    }
  }
}

}  // namespace

LmHeadKernels lm_head_confidence(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {words, pack_as<BFloat16>, kHeadTokens, multiply_as<BFloat16>};
    case DType::kFloat16:
      return {words, pack_as<Float16>, kHeadTokens, multiply_as<Float16>};
    default:
      return {words, pack_as<float>, kHeadTokens, multiply_as<float>};
  }
}

}  // namespace dlm::cpu::generic
