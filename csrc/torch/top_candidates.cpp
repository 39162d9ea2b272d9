// SPDX-License-Identifier: Apache-2.0
#include "cpu/top_candidates.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#include "torch/top_candidates.h"
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
  // The second pass over a row reads about k chunks.
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
  check.not_differentiable({{"logits", logits}});
  const Candidates found(check, k, row_map, banned, bitmask, !logits.is_cuda(), rows, p);
  if (rows.N == 0) return found.all();

#ifdef DLM_WITH_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(check, logits);
    call.supports(cuda::unsupported_top_candidates(p));
    Tensor workspace =
        check.empty("workspace", {cuda::top_candidates_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_top_candidates(p, workspace.mutable_data_ptr(), call.stream()));
    return found.all();
  }
#endif

  run_on_cpu(check, p);
  return found.all();
}

}  // namespace dlm
