// SPDX-License-Identifier: Apache-2.0
// out = (sum over kept v of w_v E_v) / (sum of w), w_v = e^((z_v - max) / T), of a tile of rows and
// columns at a time: the weights of a block of the vocabulary are computed on the stack, then each
// row of E is converted once and added to all rows that give it a weight. Sums are float over a
// block and double over blocks, in the vocabulary's order, whatever the tile. Flops: 2 V D a row,
// at the rate of the processor's vectors; what is not kept is not read. Weights are computed once
// for each tile of columns: 20 operations beside 512.
#include <algorithm>
#include <limits>

#include "common/math.h"
#include "cpu/soft_embedding.h"

namespace dlm::cpu::generic {
namespace {

constexpr int kBlock = 32;  // ids at a time
constexpr int kRows = int(kSoftRows), kColumns = int(kSoftColumns);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

float sum(const float* x, int n) {
  constexpr int lanes = 16;
  float lane[lanes] = {};
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) lane[l] += x[i + l];
  }
  for (int l = 0; l < n - i; ++l) lane[l] += x[i + l];
  for (int width = lanes / 2; width; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

// One row of logits, as the weights of its vocabulary.
template <class L>
class Weights {
 public:
  void init(const SoftEmbeddingParams& p, int64_t n) {
    const int64_t source = p.row_map ? p.row_map[n] : n;
    if (source < 0 || p.argmax[n] < 0) return;
    logits_ = static_cast<const L*>(p.logits) + source * p.logits_stride;
    max_ = std::min(to_float(logits_[p.argmax[n]]), kLargest);
    const float asked = p.temperature.at(n, 0.0f);
    inverse_ = asked > 0.0f ? div_rn(1.0f, asked) : 1.0f;
    floor_ = p.floor ? p.floor[n] : -kInfinity;
  }

  // Of ids begin, ..., begin + n - 1; what is not kept has none, and is added to the rest.
  void block(int64_t begin, int n, float* weight) {
    if (!logits_) {
      std::fill_n(weight, n, 0.0f);
      return;
    }
    for (int i = 0; i < n; ++i) {
      float z = to_float(logits_[begin + i]);
      z = z > kLargest ? kLargest : z;
      weight[i] = exp_normal((z - max_) * inverse_);  // 0 of NaN and -inf
    }
    if (floor_ > -kInfinity) {
      float left[kBlock];
      for (int i = 0; i < n; ++i) {
        const bool keeps = std::min(to_float(logits_[begin + i]), kLargest) >= floor_;
        left[i] = keep_if(!keeps, weight[i]);
        weight[i] = keep_if(keeps, weight[i]);
      }
      rest += sum(left, n);
    }
    total += sum(weight, n);
  }

  double total = 0.0, rest = 0.0;

 private:
  const L* logits_ = nullptr;
  float max_ = 0.0f, inverse_ = 1.0f, floor_ = -kInfinity;
};

template <class L, class T>
class Tile {
 public:
  Tile(const SoftEmbeddingParams& p, int64_t item)
      : p_(p), rows_(0), columns_(0), first_row_(0), first_column_(0) {
    const int64_t across = (p.D + kColumns - 1) / kColumns;
    first_row_ = item / across * kRows;
    first_column_ = item % across * kColumns;
    rows_ = int(std::min<int64_t>(kRows, p.N - first_row_));
    columns_ = int(std::min<int64_t>(kColumns, p.D - first_column_));
    for (int r = 0; r < rows_; ++r) of_row_[r].init(p, first_row_ + r);
  }

  void run() {
    for (int r = 0; r < rows_; ++r) std::fill_n(sum_[r], kColumns, 0.0);
    for (int64_t begin = 0; begin < p_.V; begin += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, p_.V - begin));
      for (int r = 0; r < rows_; ++r) of_row_[r].block(begin, n, weight_[r]);
      add_block(begin, n);
    }
    finish();
  }

 private:
  const T* embedding(int64_t id) const {
    return static_cast<const T*>(p_.weight) + id * p_.weight_stride + first_column_;
  }

  void add_block(int64_t begin, int n) {
    bool any[kRows] = {};
    for (int i = 0; i < n; ++i) {
      float most = 0.0f;
      for (int r = 0; r < rows_; ++r) most = std::max(most, weight_[r][i]);
      if (most == 0.0f) continue;
      const T* from = embedding(begin + i);
      float e[kColumns];
      for (int d = 0; d < columns_; ++d) e[d] = to_float(from[d]);
      for (int r = 0; r < rows_; ++r) {
        const float w = weight_[r][i];
        if (w == 0.0f) continue;
        float* block = block_[r];
        if (!any[r]) std::fill_n(block, kColumns, 0.0f);
        any[r] = true;
        if (columns_ == kColumns) {
          for (int d = 0; d < kColumns; ++d) block[d] += w * e[d];
        } else {
          for (int d = 0; d < columns_; ++d) block[d] += w * e[d];
        }
      }
    }
    for (int r = 0; r < rows_; ++r) {
      for (int d = 0; any[r] && d < columns_; ++d) sum_[r][d] += block_[r][d];
    }
  }

  void finish() const {
    for (int r = 0; r < rows_; ++r) {
      const bool mixes = p_.mask_token_id >= 0;
      const double rest = mixes ? of_row_[r].rest : 0.0, total = of_row_[r].total + rest;
      T* out = static_cast<T*>(p_.out) + (first_row_ + r) * p_.D + first_column_;
      const double scale = total > 0.0 ? 1.0 / total : 0.0, share = rest * scale;
      const T* mask = mixes ? embedding(p_.mask_token_id) : nullptr;
      for (int d = 0; d < columns_; ++d) {
        const double value = sum_[r][d] * scale;
        out[d] = from_float<T>(float(share > 0.0 ? value + share * to_float(mask[d]) : value));
      }
    }
  }

  const SoftEmbeddingParams& p_;
  int rows_, columns_;
  int64_t first_row_, first_column_;
  Weights<L> of_row_[kRows];
  float weight_[kRows][kBlock], block_[kRows][kColumns];
  double sum_[kRows][kColumns];
};

template <class L, class T>
void tiles(const SoftEmbeddingParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) Tile<L, T>(p, i).run();
}

template <class L>
void tiles_of(const SoftEmbeddingParams& p, int64_t begin, int64_t end) {
  switch (p.weight_dtype) {
    case DType::kFloat32:
      return tiles<L, float>(p, begin, end);
    case DType::kBFloat16:
      return tiles<L, BFloat16>(p, begin, end);
    default:
      return tiles<L, Float16>(p, begin, end);
  }
}

}  // namespace

void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return tiles_of<float>(p, begin, end);
    case DType::kBFloat16:
      return tiles_of<BFloat16>(p, begin, end);
    default:
      return tiles_of<Float16>(p, begin, end);
  }
}

}  // namespace dlm::cpu::generic
