// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <tuple>

#include "torch/check.h"
#include "torch/token_confidence.h"

namespace dlm {

// What ops with the results of top_candidates have in common: the number of candidates, the row
// map, bans and bitmask, and the results. Fills in `p` and its `rows`, whose R and V are already
// known. If `on_cpu`, values are checked as well.
struct Candidates {
  Tensor ids, values, logsumexp;

  template <class Params>
  Candidates(const Check& check, int64_t k, const MaybeTensor& row_map, const MaybeTensor& banned,
             const MaybeTensor& bitmask, bool on_cpu, TokenConfidenceParams& rows, Params& p) {
    check.that(k >= 1 && k <= kMostCandidates, "k must be in [1, ", kMostCandidates, "]; got ", k);
    p.k = k;
    rows.row_map = check.dense<int32_t>("row_map", row_map, {-1});
    const int64_t N = rows.N = row_map ? row_map->numel() : rows.R;
    rows.bias_rows_per_value = std::max<int64_t>(N, 1);
    check_bans(check, banned, bitmask, rows);
    if (on_cpu) {  // on CUDA, checking values would make the host wait for them
      check.indices("row_map", rows.row_map, N, rows.R);
      check.indices("banned", rows.banned, banned ? banned->numel() : 0, rows.V);
    }
    ids = check.empty("ids", {N, k}, ScalarType::Long);
    values = check.empty("values", {N, k}, ScalarType::Float);
    logsumexp = check.empty("logsumexp", {N}, ScalarType::Float);
    p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
    p.values = static_cast<float*>(values.mutable_data_ptr());
    p.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  }
  std::tuple<Tensor, Tensor, Tensor> all() const { return {ids, values, logsumexp}; }
};

}  // namespace dlm
