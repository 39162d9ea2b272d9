// SPDX-License-Identifier: Apache-2.0
#include "cpu/verify_drafts.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/verify_drafts.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// Checks a tensor of logits with `rows` rows, unless a map selects its rows.
const void* logits_rows(const Check& check, const char* name, const Tensor& t, const Tensor& like,
                        const MaybeTensor& row_map, int64_t rows, int64_t* stride) {
  check.device(name, t);
  if (&t == &like) {
    check.dtype(name, t, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check.sizes(name, t, {row_map ? -1 : rows, -1});
  } else {
    check.dtype(name, t, {like.scalar_type()});
    check.sizes(name, t, {row_map ? -1 : rows, like.size(1)});
  }
  check.rows_dense(name, t);
  *stride = t.stride(0);
  return t.const_data_ptr();
}

// Checks values on the CPU, where reading them does not make the host wait.
void check_values(const Check& check, const VerifyDraftsParams& p, const MaybeTensor& temperature) {
  check.indices("row_map", p.row_map, p.B * (p.W + 1), p.R);
  check.indices("draft_row_map", p.draft_row_map, p.B * p.W, p.Q);
  for (int64_t i = 0; i < p.B * p.W; ++i) {
    if (p.drafts[i] < p.V) continue;
    check.that(false, "drafts must be below the vocabulary's size ", p.V, "; got ", p.drafts[i],
               " at [", i / p.W, ", ", i % p.W, "]");
  }
  check.indices("banned", p.banned, p.banned_count, p.V);
  check.temperatures("temperature", temperature);
}

}  // namespace

std::tuple<Tensor, Tensor> verify_drafts(
    const Tensor& drafts, const Tensor& token, const MaybeTensor& logits,
    const MaybeTensor& logsumexp, const MaybeTensor& row_map, const MaybeTensor& draft_logits,
    const MaybeTensor& draft_logsumexp, const MaybeTensor& draft_row_map, const MaybeTensor& banned,
    const MaybeTensor& temperature, double leniency, const MaybeTensor& seed,
    const MaybeTensor& step, const MaybeTensor& position) {
  const Check check("verify_drafts", "drafts", drafts);
  VerifyDraftsParams p{};
  p.drafts = check.dense<int64_t>("drafts", drafts, {-1, -1});
  const int64_t B = p.B = drafts.size(0), W = p.W = drafts.size(1);
  p.token = check.dense<int64_t>("token", token, {B, W + 1});
  p.logsumexp = check.dense<float>("logsumexp", logsumexp, {B, W + 1});
  p.row_map = check.dense<int32_t>("row_map", row_map, {B, W + 1});
  p.draft_logsumexp = check.dense<float>("draft_logsumexp", draft_logsumexp, {B, W});
  p.draft_row_map = check.dense<int32_t>("draft_row_map", draft_row_map, {B, W});
  if (logits) {
    p.logits =
        logits_rows(check, "logits", *logits, *logits, row_map, B * (W + 1), &p.logits_stride);
    p.R = logits->size(0);
    p.V = logits->size(1);
    p.dtype = element_type(*logits);
  }
  if (draft_logits) {
    check.that(logits.has_value(), "logits is required by draft_logits; got None");
    p.draft_logits = logits_rows(check, "draft_logits", *draft_logits, *logits, draft_row_map,
                                 B * W, &p.draft_stride);
    p.Q = draft_logits->size(0);
  }
  p.banned = check.dense<int64_t>("banned", banned, {-1});
  p.banned_count = banned ? banned->numel() : 0;
  p.temperature = check.per_row<float>("temperature", temperature, B);
  p.random.seed = check.per_row<int64_t>("seed", seed, B);
  p.random.step = check.per_row<int32_t>("step", step, B);
  p.random.position = check.dense<int32_t>("position", position, {B});
  p.leniency =
      check.float_or_zero("leniency", leniency, "accept every draft that the target can draw");
  check.that(draft_logits || !logits, "draft_logits is required by logits; got None");
  if (logits) {
    const auto required = [&](const char* name, const MaybeTensor& t) {
      check.that(t.has_value(), name, " is required by draft_logits; got None");
    };
    required("logsumexp", logsumexp);
    required("draft_logsumexp", draft_logsumexp);
    required("temperature", temperature);
    required("seed", seed);
    required("position", position);
    if (drafts.is_cpu()) check_values(check, p, temperature);
  }

  Tensor accepted = check.empty("accepted", {B}, ScalarType::Int);
  Tensor tokens = check.empty("tokens", {B, W + 1}, ScalarType::Long);
  p.accepted = static_cast<int32_t*>(accepted.mutable_data_ptr());
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  if (B == 0) return {accepted, tokens};

#ifdef DLM_WITH_CUDA
  if (drafts.is_cuda()) {
    const CudaCall call(check, drafts);
    call.supports(cuda::unsupported_verify_drafts(p));
    Tensor workspace =
        check.empty("workspace", {cuda::verify_drafts_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_verify_drafts(p, workspace.mutable_data_ptr(), call.stream()));
    return {accepted, tokens};
  }
#endif

  // A row that rejects a draft reads two rows of logits, at a few nanoseconds per logit; waking a
  // second thread pays off from about 50 microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 20000 / std::max<int64_t>(p.V + W, 1));
  torch::stable::parallel_for(
      0, B, grain, [&](int64_t begin, int64_t end) { cpu::verify_drafts(p, begin, end); });
  return {accepted, tokens};
}

}  // namespace dlm
