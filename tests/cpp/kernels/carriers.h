// SPDX-License-Identifier: Apache-2.0
// Inputs and checks of the two carrier kernels, for their tests and for the faulty versions.
#pragma once
#include <string>

#include "check.h"
#include "kernels/row_reduce.cuh"
#include "kernels/tile_product.cuh"
#include "reference.h"

namespace check {

inline std::string message(const char* format, double a, double b, double c, double d) {
  char text[200];
  snprintf(text, sizeof text, format, a, b, c, d);
  return text;
}

struct RowCase {
  int64_t rows;
  int32_t columns, splits;
  int64_t stride;
  Array<dlm::BFloat16>
      x;  // ends with the last chunk of the last row, so that reading on leaves the allocation
  Array<dlm::cuda::RowPart> out, part;
  Array<uint32_t> arrived;

  RowCase(int64_t rows_, int32_t columns_, int32_t splits_, uint64_t seed)
      : rows(rows_),
        columns(columns_),
        splits(splits_),
        stride((columns + 7) / 8 * 8),
        x(size_t(rows * stride)),
        out(size_t(rows)),
        part(size_t(rows * splits)),
        arrived(size_t(rows)) {
    Random random(seed);
    fill_normal(x, random);
    for (int64_t r = 0; r < rows; ++r) {
      // A tie, far apart; and in the padding values that would show.
      x[size_t(r * stride + columns / 3)] = x[size_t(r * stride + columns - 1)] =
          dlm::from_float<dlm::BFloat16>(20);
      for (int64_t i = columns; i < stride; ++i)
        x[size_t(r * stride + i)] = dlm::from_float<dlm::BFloat16>(99);
      out[size_t(r)] = {NAN, -1, NAN};
    }
    for (auto& p : part) p = {NAN, -1, NAN};
  }
  dlm::cuda::RowReduceParams params() {
    return {x.data(), stride, columns, splits, out.data(), part.data(), arrived.data()};
  }
  std::string wrong() const {  // empty: all is right
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, maximum = -INFINITY, magnitude = 0;
      int index = -1;
      for (int i = 0; i < columns; ++i) {
        const double v = dlm::to_float(x[size_t(r * stride + i)]);
        sum += v;
        magnitude += std::fabs(v);
        if (v > maximum) maximum = v, index = i;
      }
      const auto& got = out[size_t(r)];
      if (got.maximum != maximum || got.index != index) {
        return message("row %g: maximum %g at %g, expected at %g", double(r), got.maximum,
                       got.index, index);
      }
      if (!(std::fabs(got.sum - sum) <= 1e-6 * magnitude)) {
        return message("row %g: sum %.9g, expected %.9g (%g columns)", double(r), got.sum, sum,
                       columns);
      }
      if (arrived[size_t(r)] != 0) return "the counter was not reset";
    }
    return "";
  }
};

struct TileCase {
  int32_t M, N, K;
  int64_t stride;
  Array<dlm::BFloat16> a, b;
  Array<float> c;

  TileCase(int32_t M_, int32_t N_, int32_t K_, uint64_t seed)
      : M(M_),
        N(N_),
        K(K_),
        stride((K + 31) / 32 * 32),
        a(size_t(M * stride)),
        b(size_t(N * stride)),
        c(size_t(M) * N, NAN) {
    Random random(seed);
    fill_normal(a, random);
    fill_normal(b, random);
    for (auto* x : {&a, &b}) {
      for (size_t i = 0; i < x->size(); ++i) {
        if (int64_t(i) % stride >= K) (*x)[i] = dlm::from_float<dlm::BFloat16>(99);
      }
    }
  }
  dlm::cuda::TileProductParams params() { return {a.data(), b.data(), stride, M, N, K, c.data()}; }
  std::string wrong() const {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        double sum = 0, magnitude = 0;
        for (int k = 0; k < K; ++k) {
          const double term = double(dlm::to_float(a[size_t(m * stride + k)])) *
                              dlm::to_float(b[size_t(n * stride + k)]);
          sum += term;
          magnitude += std::fabs(term);
        }
        const double got = c[size_t(m) * N + n];
        if (!(std::fabs(got - sum) <= 1e-6 * magnitude)) {
          return message("c[%g,%g] is %.9g, expected %.9g", m, n, got, sum);
        }
      }
    }
    return "";
  }
};

}  // namespace check
