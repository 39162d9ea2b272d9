// SPDX-License-Identifier: Apache-2.0
#include "cpu/top_candidates.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#include "torch/token_confidence.h"
#ifdef DLM_WITH_CUDA
#include "cuda/top_candidates.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

void run_on_cpu(const Check& check, const TopCandidatesParams& p) {
  const int64_t N = p.rows.N, parts = cpu::token_confidence_parts(p.rows.V);
  Tensor workspace =
      check.empty("workspace", {N * cpu::top_candidates_sums(p.rows.V)}, ScalarType::Float);
  float* sums = static_cast<float*>(workspace.mutable_data_ptr());
  const int64_t part = std::min(p.rows.V, cpu::kPart), grain = cpu::token_confidence_grain();
  torch::stable::parallel_for(
      0, N * parts, std::max<int64_t>(1, grain / part),
      [&](int64_t begin, int64_t end) { cpu::top_candidates_scan(p, sums, begin, end); });
  // A row's second look is at some k chunks.
  const int64_t looked_at = std::min(p.rows.V, p.k * kRaceChunk);
  torch::stable::parallel_for(
      0, N, std::max<int64_t>(1, grain / looked_at),
      [&](int64_t begin, int64_t end) { cpu::top_candidates_finish(p, sums, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> top_candidates(const Tensor& logits, int64_t k,
                                                  const MaybeTensor& row_map,
                                                  const MaybeTensor& banned,
                                                  const MaybeTensor& bitmask) {
  const Check check("top_candidates", "logits", logits);
  TopCandidatesParams p{};
  TokenConfidenceParams& rows = p.rows;
  check.dtype("logits", logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("logits", logits, {-1, -1});
  check.rows_dense("logits", logits);
  rows.R = logits.size(0), rows.V = logits.size(1);
  check.that(rows.V >= 1, "logits must have at least one column; got ", Check::shape(logits));
  rows.dtype = element_type(logits);
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  check.that(k >= 1 && k <= kMostCandidates, "k must be in [1, ", kMostCandidates, "]; got ", k);
  p.k = k;
  rows.row_map = check.dense<int32_t>("row_map", row_map, {-1});
  const int64_t N = rows.N = row_map ? row_map->numel() : rows.R;
  rows.bias_rows_per_value = std::max<int64_t>(N, 1);
  check_bans(check, banned, bitmask, rows);
  if (logits.is_cpu()) {  // elsewhere, a look at the values would have the host wait for them
    check.indices("row_map", rows.row_map, N, rows.R);
    check.indices("banned", rows.banned, banned ? banned->numel() : 0, rows.V);
  }

  check.not_differentiable({{"logits", logits}});

  Tensor ids = check.empty("ids", {N, k}, ScalarType::Long);
  Tensor values = check.empty("values", {N, k}, ScalarType::Float);
  Tensor logsumexp = check.empty("logsumexp", {N}, ScalarType::Float);
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  p.values = static_cast<float*>(values.mutable_data_ptr());
  p.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  if (N == 0) return {ids, values, logsumexp};

#ifdef DLM_WITH_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(check, logits);
    call.supports(cuda::unsupported_top_candidates(p));
    Tensor workspace =
        check.empty("workspace", {cuda::top_candidates_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_top_candidates(p, workspace.mutable_data_ptr(), call.stream()));
    return {ids, values, logsumexp};
  }
#endif

  run_on_cpu(check, p);
  return {ids, values, logsumexp};
}

}  // namespace dlm
