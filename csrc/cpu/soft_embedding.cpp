// SPDX-License-Identifier: Apache-2.0
// out = (sum over kept v of w_v E_v) / (sum of w), w_v = e^((z_v - max) / T).
//   dense     one tile of rows and columns at a time: the weights of 64 ids are computed for each
//   row,
//             then the 64 rows of E are added to all rows. Weights are recomputed for each tile of
//             columns, which takes about 15 operations compared with 512.
//   filtered  one row at a time: its weights are computed once, with a list of the ids that are
//             kept; only their rows of E are read.
// Sums are float within 64 ids and double across them, in vocabulary order, whatever the tile.
// Flops: 2 V D per row, at the rate of the processor's vectors, or of memory for few rows.
#include "cpu/soft_embedding.h"

#include <algorithm>

#include "cpu/isa.h"

namespace dlm::cpu {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kMostKept = 512;  // ids in a list; rows that keep more are processed as dense

struct Kernel {
  WeightsKernel weights;
  AddKernel add;
};
constexpr ForIsa<Kernel> kTable[] = {
    {Isa::kGeneric, {generic::soft_weights, generic::soft_add}},
#ifdef DLM_X86
    {Isa::kAvx2, {avx2::soft_weights, avx2::soft_add}},
    {Isa::kAvx512, {avx512::soft_weights, avx512::soft_add}},
#endif
};

float element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[at];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[at]);
    default:
      return to_float(static_cast<const Float16*>(data)[at]);
  }
}
void set_element(void* data, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[at] = value;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[at] = from_float<BFloat16>(value);
      break;
    default:
      static_cast<Float16*>(data)[at] = from_float<Float16>(value);
  }
}

SoftRow row_of(const SoftEmbeddingParams& p, int64_t n) {
  SoftRow row;
  const int64_t source = p.row_map ? p.row_map[n] : n;
  if (source < 0 || p.argmax[n] < 0) return row;
  row.logits =
      static_cast<const char*>(p.logits) + source * p.logits_stride * element_size(p.dtype);
  row.max = std::min(element(row.logits, p.dtype, p.argmax[n]), kLargest);
  const float asked = p.temperature.at(n, 0.0f);
  row.inverse = asked > 0.0f ? 1.0f / asked : 1.0f;
  if (p.floor) row.floor = p.floor[n];
  return row;
}

// A row's total weight: of what is kept, and of the rest.
struct Totals {
  double kept = 0.0, rest = 0.0;

  // Adds the weights of a block, and sets those that are not kept to zero.
  void add(float* weight, uint64_t kept_bits) {
    if (~kept_bits) {
      float left[kSoftIds];
      for (int i = 0; i < kSoftIds; ++i) {
        const bool stays = kept_bits >> i & 1;
        left[i] = stays ? 0.0f : weight[i];
        weight[i] = stays ? weight[i] : 0.0f;
      }
      rest += sum(left);
    }
    kept += sum(weight);
  }

 private:
  static float sum(const float* x) {  // in lanes: sequential additions would wait for each other
    float lane[8] = {};
    for (int i = 0; i < kSoftIds; i += 8) {
      for (int l = 0; l < 8; ++l) lane[l] += x[i + l];
    }
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

class Rows {
 public:
  explicit Rows(const SoftEmbeddingParams& p) : p_(p), kernel_(best_for(isa(), kTable).kernels) {}

  void filtered(int64_t n) {
    const SoftRow row = row_of(p_, n);
    Totals totals;
    int32_t count = 0;
    for (int64_t begin = 0; row.logits && begin < p_.V; begin += kSoftIds) {
      uint64_t kept = weigh(row, begin, weight_[0]);
      totals.add(weight_[0], kept);
      for (; kept; kept &= kept - 1, ++count) {
        const int i = __builtin_ctzll(kept);
        if (count == kMostKept) return dense_row(n);
        ids_[count] = begin + i;
        weights_[count] = weight_[0][i];
      }
    }
    for (int64_t column = 0; column < p_.D; column += kSoftColumns) {
      const int columns = int(std::min<int64_t>(kSoftColumns, p_.D - column));
      clear(1);
      for (int32_t k = 0; k < count; ++k) {
        weight_[0][0] = weights_[k];
        kernel_.add(embedding(ids_[k], column), p_.weight_dtype, p_.weight_stride, 1, columns,
                    weight_, 1, sums_);
      }
      write(n, column, columns, sums_[0], totals);
    }
  }

  void dense_row(int64_t n) {
    for (int64_t column = 0; column < p_.D; column += kSoftColumns) dense(n, 1, column);
  }

  void dense(int64_t first, int rows, int64_t column) {
    const int columns = int(std::min<int64_t>(kSoftColumns, p_.D - column));
    SoftRow of_row[kSoftRows];
    Totals totals[kSoftRows];
    for (int r = 0; r < rows; ++r) of_row[r] = row_of(p_, first + r);
    clear(rows);
    for (int64_t begin = 0; begin < p_.V; begin += kSoftIds) {
      const int n = int(std::min<int64_t>(kSoftIds, p_.V - begin));
      for (int r = 0; r < rows; ++r) totals[r].add(weight_[r], weigh(of_row[r], begin, weight_[r]));
      kernel_.add(embedding(begin, column), p_.weight_dtype, p_.weight_stride, n, columns, weight_,
                  rows, sums_);
    }
    for (int r = 0; r < rows; ++r) write(first + r, column, columns, sums_[r], totals[r]);
  }

 private:
  uint64_t weigh(const SoftRow& row, int64_t begin, float* weight) const {
    if (!row.logits) {
      std::fill_n(weight, kSoftIds, 0.0f);
      return 0;
    }
    const int n = int(std::min<int64_t>(kSoftIds, p_.V - begin));
    return kernel_.weights(row, p_.dtype, begin, n, weight);
  }
  const void* embedding(int64_t id, int64_t column) const {
    const int64_t at = id * p_.weight_stride + column;
    return static_cast<const char*>(p_.weight) + at * element_size(p_.weight_dtype);
  }
  void clear(int rows) {
    for (int r = 0; r < rows; ++r) std::fill_n(sums_[r], kSoftColumns, 0.0);
  }

  void write(int64_t n, int64_t column, int columns, const double* sums, const Totals& t) const {
    const double rest = p_.mask_token_id >= 0 ? t.rest : 0.0, total = t.kept + rest;
    const double scale = total > 0.0 ? 1.0 / total : 0.0, share = rest * scale;
    const void* mask = share > 0.0 ? embedding(p_.mask_token_id, column) : nullptr;
    for (int d = 0; d < columns; ++d) {
      double value = sums[d] * scale;
      if (mask) value += share * element(mask, p_.weight_dtype, d);
      set_element(p_.out, p_.weight_dtype, n * p_.D + column + d, float(value));
    }
  }

  const SoftEmbeddingParams& p_;
  const Kernel kernel_;
  float weight_[kSoftRows][kSoftIds] = {};  // zero for rows that do not exist
  double sums_[kSoftRows][kSoftColumns] = {};
  int64_t ids_[kMostKept];
  float weights_[kMostKept];
};

int64_t column_tiles(const SoftEmbeddingParams& p) {
  return (p.D + kSoftColumns - 1) / kSoftColumns;
}

}  // namespace

Isa soft_embedding_isa(Isa isa) { return best_for(isa, kTable).isa; }

int64_t soft_embedding_items(const SoftEmbeddingParams& p) {
  return p.floor ? p.N : (p.N + kSoftRows - 1) / kSoftRows * column_tiles(p);
}

void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end) {
  Rows rows(p);
  const int64_t across = column_tiles(p);
  for (int64_t i = begin; i < end; ++i) {
    if (p.floor) {
      rows.filtered(i);
    } else {
      const int64_t first = i / across * kSoftRows;
      rows.dense(first, int(std::min<int64_t>(kSoftRows, p.N - first)), i % across * kSoftColumns);
    }
  }
}

}  // namespace dlm::cpu
