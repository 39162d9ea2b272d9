// SPDX-License-Identifier: Apache-2.0
#include "cpu/lm_head_confidence.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#include "torch/token_confidence.h"
#ifdef DLM_WITH_CUDA
#include "cuda/lm_head_confidence.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// Processes slices of rows one after the other.
void run_on_cpu(const Check& check, LmHeadConfidenceParams p) {
  // Leave out unused rows, so that they cost nothing.
  Tensor used = check.empty("workspace", {p.rows.row_map ? p.rows.N : 0}, ScalarType::Int);
  if (p.rows.row_map) {
    int32_t* rows = static_cast<int32_t*>(used.mutable_data_ptr());
    for (int64_t n = 0; n < p.rows.N; ++n) {
      if (p.rows.row_map[n] >= 0) {
        rows[p.used_count++] = int32_t(n);
      } else {
        cpu::finish_unused_row(p, n);
      }
    }
    p.used = rows;
    if (p.used_count == 0) return;
  }
  const cpu::LmHeadPlan plan = cpu::plan_lm_head_confidence(p, torch::stable::get_num_threads());
  Tensor workspace = check.empty("workspace", {plan.workspace / 8 + 8}, ScalarType::Long);
  const uintptr_t memory = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  void* aligned = reinterpret_cast<void*>((memory + 63) / 64 * 64);
  // Waking a second thread pays off from about 50 microseconds of work.
  const int64_t grain =
      std::max<int64_t>(1, (int64_t(1) << 23) / (1024 * std::max<int64_t>(plan.rows * p.D, 1)));
  for (int64_t begin = 0; begin < p.count(); begin += plan.rows) {
    const int64_t end = std::min(begin + plan.rows, p.count());
    cpu::pack_lm_head(p, plan, aligned, begin, end);
    torch::stable::parallel_for(0, cpu::lm_head_tiles(p), grain, [&](int64_t first, int64_t last) {
      cpu::multiply_lm_head(p, plan, aligned, begin, end, first, last);
    });
    torch::stable::parallel_for(0, plan.shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share)
        cpu::finish_lm_head(p, plan, aligned, begin, end, share);
    });
  }
}

}  // namespace

void run_lm_head_confidence(const Check& check, const Tensor& anchor,
                            const LmHeadConfidenceParams& p) {
#ifdef DLM_WITH_CUDA
  if (anchor.is_cuda()) {
    const CudaCall call(check, anchor);
    call.supports(cuda::unsupported_lm_head_confidence(p));
    Tensor workspace =
        check.empty("workspace", {cuda::lm_head_confidence_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_lm_head_confidence(p, workspace.mutable_data_ptr(), call.stream()));
    return;
  }
#endif
  (void)anchor;
  run_on_cpu(check, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lm_head_confidence(
    const Tensor& hidden, const Tensor& weight, const MaybeTensor& row_map,
    const MaybeTensor& given, const MaybeTensor& uncond_hidden, const MaybeTensor& cfg_scale,
    const MaybeTensor& bias, const MaybeTensor& banned, const MaybeTensor& bitmask,
    const MaybeTensor& temperature, const MaybeTensor& top_k, const MaybeTensor& top_p,
    bool top_p_first, bool keep_crossing, const std::string& distribution, const MaybeTensor& seed,
    const MaybeTensor& step, const MaybeTensor& position, const MaybeTensor& redraw,
    bool with_margin, bool with_entropy) {
  const Check check("lm_head_confidence", "hidden", hidden);
  LmHeadConfidenceParams p{};
  check.dtype("hidden", hidden, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("hidden", hidden, {-1, -1});
  check.rows_dense("hidden", hidden);
  p.rows.R = hidden.size(0), p.D = hidden.size(1);
  p.rows.dtype = element_type(hidden);
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  const auto like_hidden = [&](const char* name, const Tensor& t, int64_t rows) {
    check.device(name, t);
    check.dtype(name, t, {hidden.scalar_type()});
    check.sizes(name, t, {rows, p.D});
    check.rows_dense(name, t);
    return t.const_data_ptr();
  };
  p.weight = like_hidden("weight", weight, -1);
  p.weight_stride = weight.stride(0);
  p.rows.V = weight.size(0);
  check.that(p.rows.V >= 1, "weight must have at least one row; got ", Check::shape(weight));
  if (uncond_hidden) {
    p.uncond_hidden = like_hidden("uncond_hidden", *uncond_hidden, p.rows.R);
    p.uncond_stride = uncond_hidden->stride(0);
  }
  check_confidence_arguments(
      check,
      {row_map, given, cfg_scale, bias, banned, bitmask, temperature, top_k, top_p, top_p_first,
       keep_crossing, distribution, seed, step, position, redraw},
      !hidden.is_cuda(), uncond_hidden, "uncond_hidden", p.rows);

  check.not_differentiable({{"hidden", hidden},
                            {"weight", weight},
                            {"uncond_hidden", uncond_hidden},
                            {"cfg_scale", cfg_scale},
                            {"bias", bias},
                            {"temperature", temperature},
                            {"top_p", top_p}});

  const ConfidenceResults results(check, with_margin, with_entropy, p.rows);
  if (p.rows.N > 0) run_lm_head_confidence(check, hidden, p);
  return results.all();
}

}  // namespace dlm
