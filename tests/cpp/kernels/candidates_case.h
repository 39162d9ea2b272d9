// SPDX-License-Identifier: Apache-2.0
// Random logits for top_candidates, and what a sort makes of them; logsumexp in float64.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/top_candidates.cuh"
#include "reference.h"

namespace check {

struct CandidatesCase {
  enum With : unsigned {
    kMap = 1,
    kBanned = 2,
    kBitmask = 4,
    kTies = 8,      // few distinct logits
    kSpecial = 16,  // NaN, infinities, zeros of both signs
    kShifted = 32,  // rows start anywhere
    kWild = 64,     // rows and ids out of range
    kRising = 128,  // each logit above the one before
    kCrowded = 256  // all of the best in one chunk
  };
  static constexpr int64_t kBans = 3;

  dlm::TopCandidatesParams p{};
  unsigned with;
  Array<uint8_t> logits, workspace;
  Array<int32_t> row_map, bitmask;
  Array<int64_t> banned, ids;
  Array<float> values, logsumexp;
  std::vector<float> z;  // [R,V] as stored, without NaN and +inf

  CandidatesCase(dlm::DType dtype, int64_t N, int64_t V, int64_t k, unsigned with_, uint64_t seed)
      : with(with_),
        row_map(size_t(N)),
        bitmask(size_t(N * ((V + 31) / 32))),
        banned(size_t(N * kBans)),
        ids(size_t(N * k), -7),
        values(size_t(N * k), NAN),
        logsumexp(size_t(N), NAN) {
    Random random(seed);
    const auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    dlm::TokenConfidenceParams& rows = p.rows;
    rows.dtype = dtype, rows.N = N, rows.V = V, rows.R = with & kMap ? 3 : N;
    const int64_t size = dtype == dlm::DType::kFloat32 ? 4 : 2;
    const int64_t offset = with & kShifted ? 1 + below(7) : 0;
    rows.logits_stride = with & kShifted ? V + below(9) : (V + 15) / 16 * 16;
    logits = Array<uint8_t>(size_t(size * (offset + rows.logits_stride * (rows.R - 1) + V)));
    // What must not be read is larger than anything else.
    for (int64_t i = 0; i < int64_t(logits.size()) / size; ++i) write(i, 60000);
    z.resize(size_t(rows.R * V));
    const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 0.0f};
    for (int64_t r = 0; r < rows.R; ++r) {
      const int64_t crowd = below(V);
      for (int64_t v = 0; v < V; ++v) {
        float x = with & kTies ? float(below(5)) : float(3 * random.normal());
        if (with & kRising) x = float(v - V / 2);
        if (with & kCrowded && v >= crowd && v < crowd + 100) x += 30;
        if (with & kSpecial && below(std::max<int64_t>(V / 8, 2)) == 0) x = odd[below(5)];
        if (with & kSpecial && r == 1 && below(50)) x = -INFINITY;
        const float stored = write(offset + r * rows.logits_stride + v, x);
        z[size_t(r * V + v)] = stored != stored ? -INFINITY : std::fmin(stored, 3.402823466e+38f);
      }
    }
    rows.logits = logits.data() + offset * size;
    for (auto& row : row_map) {
      row = int32_t(below(rows.R + 1)) - 1;
      if (with & kWild && below(3) == 0) row = below(2) ? int32_t(rows.R) : INT32_MIN;
    }
    for (auto& x : bitmask) x = int32_t(random.word() | random.word());
    for (auto& x : banned) {
      x = below(4) ? below(V) : -1;
      if (with & kWild && below(4) == 0) x = below(2) ? V : -5;
    }
    if (with & kMap) rows.row_map = row_map.data();
    if (with & kBanned) rows.banned = banned.data(), rows.banned_count = kBans;
    if (with & kBitmask) rows.bitmask = bitmask.data();
    rows.bitmask_words = (V + 31) / 32;
    const int64_t shared[] = {1, 2, N}, turn = below(3);
    rows.bias_rows_per_value = N;
    rows.banned_rows_per_value = shared[turn];
    rows.bitmask_rows_per_value = shared[(turn + 1) % 3];
    p.k = k, p.ids = ids.data(), p.values = values.data(), p.logsumexp = logsumexp.data();
    workspace = Array<uint8_t>(size_t(dlm::cuda::workspace_of(rows)), 0xff);
  }

  float write(int64_t i, float x) {
    if (p.rows.dtype == dlm::DType::kFloat32) return memcpy(&logits[size_t(4 * i)], &x, 4), x;
    if (p.rows.dtype == dlm::DType::kBFloat16) {
      const auto b = dlm::from_float<dlm::BFloat16>(x);
      return memcpy(&logits[size_t(2 * i)], &b, 2), dlm::to_float(b);
    }
    const auto h = dlm::from_float<dlm::Float16>(x);
    return memcpy(&logits[size_t(2 * i)], &h, 2), dlm::to_float(h);
  }

  cudaError_t start() { return dlm::cuda::start_top_candidates(p, workspace.data(), nullptr); }

  // Of row n, by id; all -inf where it is unused.
  std::vector<float> effective(int64_t n) const {
    const dlm::TokenConfidenceParams& rows = p.rows;
    const int64_t source = rows.row_map ? row_map[size_t(n)] : n;
    std::vector<float> x(size_t(rows.V), -INFINITY);
    if (source < 0 || source >= rows.R) return x;
    std::copy_n(z.begin() + source * rows.V, rows.V, x.begin());
    for (int64_t v = 0; rows.bitmask && v < rows.V; ++v) {
      const int64_t word = n / rows.bitmask_rows_per_value * rows.bitmask_words + v / 32;
      if (!(bitmask[size_t(word)] >> v % 32 & 1)) x[size_t(v)] = -INFINITY;
    }
    for (int64_t i = 0; rows.banned && i < kBans; ++i) {
      const int64_t id = banned[size_t(n / rows.banned_rows_per_value * kBans + i)];
      if (id >= 0 && id < rows.V) x[size_t(id)] = -INFINITY;
    }
    return x;
  }

  std::string wrong() const {  // empty: all is right
    char text[200];
    for (int64_t n = 0; n < p.rows.N; ++n) {
      const std::vector<float> x = effective(n);
      std::vector<int64_t> order;
      for (int64_t v = 0; v < p.rows.V; ++v) {
        if (x[size_t(v)] > -INFINITY) order.push_back(v);
      }
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return x[size_t(a)] > x[size_t(b)]; });
      for (int64_t i = 0; i < p.k; ++i) {
        const bool there = i < int64_t(order.size());
        const int64_t id = there ? order[size_t(i)] : -1, at = n * p.k + i;
        const float value = there ? x[size_t(id)] : -INFINITY;
        if (ids[size_t(at)] == id && values[size_t(at)] == value) continue;
        snprintf(text, sizeof text, "candidate %d of row %d is %d with %.9g, expected %d with %.9g",
                 int(i), int(n), int(ids[size_t(at)]), values[size_t(at)], int(id), value);
        return text;
      }
      double sum = 0, max = order.empty() ? 0 : x[size_t(order[0])];
      for (const int64_t v : order) sum += std::exp(x[size_t(v)] - max);
      const double want = order.empty() ? -INFINITY : max + std::log(sum);
      if (close(logsumexp[size_t(n)], float(want), 2e-6)) continue;
      snprintf(text, sizeof text, "logsumexp of row %d is %.9g, expected %.9g", int(n),
               logsumexp[size_t(n)], want);
      return text;
    }
    return "";
  }
};

}  // namespace check
