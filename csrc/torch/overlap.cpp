// SPDX-License-Identifier: Apache-2.0
#include "torch/overlap.h"

#include <algorithm>

namespace dlm {

void StridedSum::add(int64_t stride, int64_t count) {
  if (stride == 0 || count <= 1) return;
  for (int i = 0; i < count_; ++i) {
    if (terms_[i].stride != stride) continue;
    terms_[i].count += count - 1;  // the sum of two multiples is a multiple
    return;
  }
  terms_[count_++] = {stride, count, 0};
}

bool StridedSum::reaches(int64_t value) {
  std::sort(terms_, terms_ + count_,
            [](const Term& a, const Term& b) { return a.stride > b.stride; });
  int64_t most = 0;
  for (int i = count_ - 1; i >= 0; --i) {
    most += terms_[i].stride * (terms_[i].count - 1);
    terms_[i].most = most;
  }
  // If dimensions nest, as they do except with artificial strides, a term has only one or two
  // values to try. Cases that would take long count as reached.
  budget_ = 10000;
  return reaches(0, value);
}

bool StridedSum::reaches(int from, int64_t value) {
  if (value == 0) return true;
  if (value < 0 || from == count_ || value > terms_[from].most) return false;
  if (--budget_ < 0) return true;
  const int64_t stride = terms_[from].stride;
  const int64_t after = from + 1 < count_ ? terms_[from + 1].most : 0;
  const int64_t least = std::max<int64_t>(0, (value - after + stride - 1) / stride);
  for (int64_t x = std::min(terms_[from].count - 1, value / stride); x >= least; --x) {
    if (reaches(from + 1, value - x * stride)) return true;
  }
  return false;
}

Footprint::Footprint(const torch::stable::Tensor& t)
    : tensor_(&t), width_(int64_t(t.element_size())), dense_(t.is_contiguous()) {
  begin_ = end_ = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const int64_t numel = t.numel();
  if (numel == 0) return;
  int64_t last = numel - 1;
  if (!dense_) {
    last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += t.stride(i) * (t.size(i) - 1);
  }
  end_ += uintptr_t((last + 1) * width_);
}

bool Footprint::overlaps(const Footprint& other) const {
  if (begin_ >= other.end_ || other.begin_ >= end_) return false;
  if (dense_ && other.dense_) return true;
  // begin + sum of x * stride + byte = the same expression for the other tensor, whose terms are
  // counted from its end so that all of them are positive.
  StridedSum sum;
  for (const Footprint* f : {this, &other}) {
    for (int64_t i = 0; i < f->tensor_->dim(); ++i) {
      sum.add(f->tensor_->stride(i) * f->width_, f->tensor_->size(i));
    }
    sum.add(1, f->width_);
  }
  return sum.reaches(int64_t(other.end_ - begin_) - 1);
}

bool Footprint::overlaps_itself() const {
  if (dense_ || begin_ == end_) return false;
  // Two elements whose indices first differ in dimension k are this far apart: a positive multiple
  // of its stride, plus any difference in the dimensions after it.
  for (int64_t k = 0; k < tensor_->dim(); ++k) {
    const int64_t size = tensor_->size(k), stride = tensor_->stride(k);
    if (size == 1) continue;
    if (stride == 0) return true;
    StridedSum sum;
    sum.add(stride, size - 1);
    int64_t zero = -stride;
    for (int64_t i = k + 1; i < tensor_->dim(); ++i) {
      const int64_t most = tensor_->size(i) - 1;
      sum.add(tensor_->stride(i), 2 * most + 1);
      zero += tensor_->stride(i) * most;
    }
    if (sum.reaches(zero)) return true;
  }
  return false;
}

}  // namespace dlm
