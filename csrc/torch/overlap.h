// SPDX-License-Identifier: Apache-2.0
// Whether tensors share memory, decided exactly from addresses, sizes and strides. Two views that
// are interleaved in one buffer without common elements (such as keys and values) do not share
// memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace dlm {

// Decides whether a sum of terms, each a multiple 0 <= x < count of a positive stride, can equal a
// given value.
class StridedSum {
 public:
  void add(int64_t stride, int64_t count);
  bool reaches(int64_t value);

 private:
  struct Term {
    int64_t stride, count;
    int64_t most;  // maximum of this term and those after it
  };
  bool reaches(int from, int64_t value);

  static constexpr int kMaxTerms = 130;  // for two tensors; torch allows at most 64 dimensions
  Term terms_[kMaxTerms];
  int count_ = 0, budget_ = 0;
};

// The bytes that a tensor's elements occupy.
class Footprint {
 public:
  explicit Footprint(const torch::stable::Tensor& t);

  bool overlaps(const Footprint& other) const;
  bool overlaps_itself() const;

 private:
  const torch::stable::Tensor* tensor_;
  uintptr_t begin_, end_;  // of the bounding range; equal if there is no element
  int64_t width_;
  bool dense_;  // every byte of the range is used exactly once
};

}  // namespace dlm
