// SPDX-License-Identifier: Apache-2.0
#include "cpu/lm_head_candidates.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#include "torch/top_candidates.h"
#ifdef DLM_WITH_CUDA
#include "cuda/lm_head_candidates.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// Processes slices of rows one after the other.
void run_on_cpu(const Check& check, const LmHeadCandidatesParams& p) {
  const cpu::HeadCandidatesPlan plan =
      cpu::plan_lm_head_candidates(p, torch::stable::get_num_threads());
  Tensor workspace = check.empty("workspace", {plan.workspace / 8 + 8}, ScalarType::Long);
  const uintptr_t memory = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  void* aligned = reinterpret_cast<void*>((memory + 63) / 64 * 64);
  const int64_t N = p.head.rows.N;
  for (int64_t begin = 0; begin < N; begin += plan.rows) {
    const int64_t end = std::min(begin + plan.rows, N);
    cpu::pack_head_candidates(p, plan, aligned, begin, end);
    for (const auto step : {cpu::scan_head_candidates, cpu::finish_head_candidates}) {
      torch::stable::parallel_for(0, plan.shares, 1, [&](int64_t first, int64_t last) {
        for (int64_t share = first; share < last; ++share)
          step(p, plan, aligned, begin, end, share);
      });
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lm_head_candidates(const Tensor& hidden, const Tensor& weight,
                                                      int64_t k, const MaybeTensor& row_map,
                                                      const MaybeTensor& banned,
                                                      const MaybeTensor& bitmask) {
  const Check check("lm_head_candidates", "hidden", hidden);
  LmHeadCandidatesParams p{};
  LmHeadConfidenceParams& head = p.head;
  TokenConfidenceParams& rows = head.rows;
  check.dtype("hidden", hidden, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("hidden", hidden, {-1, -1});
  check.rows_dense("hidden", hidden);
  rows.R = hidden.size(0), head.D = hidden.size(1);
  rows.dtype = element_type(hidden);
  head.hidden = hidden.const_data_ptr();
  head.hidden_stride = hidden.stride(0);
  check.device("weight", weight);
  check.dtype("weight", weight, {hidden.scalar_type()});
  check.sizes("weight", weight, {-1, head.D});
  check.rows_dense("weight", weight);
  rows.V = weight.size(0);
  check.that(rows.V >= 1, "weight must have at least one row; got ", Check::shape(weight));
  head.weight = weight.const_data_ptr();
  head.weight_stride = weight.stride(0);
  check.not_differentiable({{"hidden", hidden}, {"weight", weight}});
  const Candidates found(check, k, row_map, banned, bitmask, !hidden.is_cuda(), rows, p);
  if (rows.N == 0) return found.all();

#ifdef DLM_WITH_CUDA
  if (hidden.is_cuda()) {
    const CudaCall call(check, hidden);
    call.supports(cuda::unsupported_lm_head_candidates(p));
    Tensor workspace =
        check.empty("workspace", {cuda::lm_head_candidates_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_lm_head_candidates(p, workspace.mutable_data_ptr(), call.stream()));
    return found.all();
  }
#endif

  run_on_cpu(check, p);
  return found.all();
}

}  // namespace dlm
