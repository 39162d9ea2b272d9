// SPDX-License-Identifier: Apache-2.0
// Random logits and tables for soft_embedding, and the result in float64 of the values as stored.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/soft_embedding.cuh"
#include "reference.h"

namespace check {

struct SoftCase {
  enum With : unsigned {
    kTemperature = 1,
    kMap = 2,
    kFloor = 4,
    kMask = 8,        // with kFloor
    kUnaligned = 16,  // a table whose rows start anywhere
    kSpecial = 32,
    kHostile = 64,   // rows out of range
    kShifted = 128,  // rows of logits start anywhere
  };

  dlm::SoftEmbeddingParams p{};
  Array<uint8_t> logits, weight, out, workspace;
  Array<int64_t> argmax;
  Array<int32_t> row_map;
  Array<float> temperature, floor;
  std::vector<double> z, e;  // as stored, sanitised
  int64_t logit_size, weight_size;

  SoftCase(dlm::DType dtype, dlm::DType weight_dtype, int64_t N, int64_t V, int64_t D,
           unsigned with, uint64_t random_seed)
      : argmax(size_t(N)),
        row_map(size_t(N)),
        temperature(size_t(N)),
        floor(size_t(N)),
        logit_size(dtype == dlm::DType::kFloat32 ? 4 : 2),
        weight_size(weight_dtype == dlm::DType::kFloat32 ? 4 : 2) {
    Random random(random_seed);
    const auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    const int64_t R = with & kMap ? 3 : N, shift = with & kShifted ? 5 : 0;
    const int64_t lead = with & kUnaligned ? 1 : 0, pad = with & kUnaligned ? 3 : 0;
    p.dtype = dtype, p.weight_dtype = weight_dtype;
    p.N = N, p.R = R, p.V = V, p.D = D;
    p.logits_stride = V + shift, p.weight_stride = D + pad;
    logits = Array<uint8_t>(size_t((R * p.logits_stride + shift) * logit_size));
    weight = Array<uint8_t>(size_t((V * p.weight_stride + lead) * weight_size));
    out = Array<uint8_t>(size_t(N * D * weight_size), 0xff);
    p.logits = logits.data() + shift * logit_size;
    p.weight = weight.data() + lead * weight_size, p.out = out.data();
    z.resize(size_t(R * V)), e.resize(size_t(V * D));
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t v = 0; v < V; ++v) {
        float x = float(3 * random.normal());
        if (with & kSpecial && below(20) == 0) x = below(2) ? -INFINITY : NAN;
        if (with & kSpecial && below(9 * V) == 0) x = INFINITY;
        write(logits, dtype, shift + r * p.logits_stride + v, x);
        const float stored = read(logits, dtype, shift + r * p.logits_stride + v);
        z[size_t(r * V + v)] = stored != stored ? -INFINITY : std::fmin(stored, 3.402823466e+38);
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t d = 0; d < D; ++d) {
        write(weight, weight_dtype, lead + v * p.weight_stride + d, float(random.normal()));
        e[size_t(v * D + d)] = read(weight, weight_dtype, lead + v * p.weight_stride + d);
      }
    }
    if (with & kMap) {
      for (auto& row : row_map) row = int32_t(below(5) ? below(R) : -1);
      if (with & kHostile) row_map[size_t(below(N))] = int32_t(R + below(9));
      p.row_map = row_map.data();
    }
    for (int64_t n = 0; n < N; ++n) {
      temperature[size_t(n)] = below(5) ? float(random.uniform(0.3, 2)) : 0.0f;
      const int64_t row = source(n);
      argmax[size_t(n)] = -1, floor[size_t(n)] = -INFINITY;
      if (row < 0) continue;
      const auto first = z.begin() + row * V, best = std::max_element(first, first + V);
      if (*best > -INFINITY) argmax[size_t(n)] = best - first;
      std::vector<double> sorted(first, first + V);
      std::sort(sorted.rbegin(), sorted.rend());
      if (below(6)) floor[size_t(n)] = float(sorted[size_t(below(std::min<int64_t>(V, 5)))]);
    }
    p.argmax = argmax.data();
    if (with & kTemperature) p.temperature = per_row(temperature, random);
    if (with & kFloor) p.floor = floor.data();
    p.mask_token_id = with & kFloor && with & kMask ? below(V) : -1;
    workspace = Array<uint8_t>(size_t(dlm::cuda::soft_workspace_of(p)), 0xff);
  }

  static void write(Array<uint8_t>& to, dlm::DType dtype, int64_t at, float value) {
    const uint16_t bits = dtype == dlm::DType::kBFloat16
                              ? dlm::from_float<dlm::BFloat16>(value).bits
                              : dlm::from_float<dlm::Float16>(value).bits;
    if (dtype == dlm::DType::kFloat32) {
      memcpy(to.data() + at * 4, &value, 4);
    } else {
      memcpy(to.data() + at * 2, &bits, 2);
    }
  }
  static float read(const Array<uint8_t>& from, dlm::DType dtype, int64_t at) {
    float value;
    uint16_t bits;
    memcpy(&bits, from.data() + at * 2, 2);
    if (dtype == dlm::DType::kBFloat16) return dlm::to_float(dlm::BFloat16{bits});
    if (dtype == dlm::DType::kFloat16) return dlm::to_float(dlm::Float16{bits});
    memcpy(&value, from.data() + at * 4, 4);
    return value;
  }

  int64_t source(int64_t n) const {
    const int64_t row = p.row_map ? row_map[size_t(n)] : n;
    return row < p.R ? row : -1;
  }

  cudaError_t start() { return dlm::cuda::start_soft_embedding(p, workspace.data(), nullptr); }

  std::string wrong() const {  // empty: all is right
    // Weights of 16 bits, and a result of as many.
    const double unit = p.weight_dtype == dlm::DType::kFloat32    ? 4e-6
                        : p.weight_dtype == dlm::DType::kBFloat16 ? 8e-3
                                                                  : 1e-3;
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t row = source(n);
      const double asked = p.temperature.at(n, 0), T = asked > 0 ? asked : 1;
      std::vector<double> share(size_t(p.V), 0.0);
      if (row >= 0 && argmax[size_t(n)] >= 0) {
        const double* of_row = z.data() + row * p.V;
        const double max = of_row[argmax[size_t(n)]];
        double kept = 0, rest = 0;
        for (int64_t v = 0; v < p.V; ++v) {
          const double w = std::exp((of_row[v] - max) / T);
          const bool keeps = !p.floor || of_row[v] >= floor[size_t(n)];
          (keeps ? kept : rest) += w;
          if (keeps) share[size_t(v)] = w;
        }
        if (p.mask_token_id >= 0) share[size_t(p.mask_token_id)] += rest, kept += rest;
        for (double& w : share) w /= kept;
      }
      for (int64_t d = 0; d < p.D; ++d) {
        double want = 0, size = 0;
        for (int64_t v = 0; v < p.V; ++v) {
          const double term = share[size_t(v)] * e[size_t(v * p.D + d)];
          want += term, size += std::fabs(term);
        }
        const float got = read(out, p.weight_dtype, n * p.D + d);
        if (std::fabs(got - want) <= unit * size + 1e-30) continue;
        char text[200];
        snprintf(text, sizeof text, "out[%d, %d] is %.9g, expected %.9g (N %d, V %d, D %d)", int(n),
                 int(d), got, want, int(p.N), int(p.V), int(p.D));
        return text;
      }
    }
    return "";
  }
};

}  // namespace check
