// SPDX-License-Identifier: Apache-2.0
#include "cpu/remask.h"

#include <algorithm>
#include <limits>

#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/remask.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

EosPolicy policy_named(const Check& check, const std::string& name) {
  if (name == "fill") return EosPolicy::kFill;
  check.that(name == "none", "eos_policy must be one of none, fill; got ", name);
  return EosPolicy::kNone;
}

// Every position must be on the canvas or -1, and distinct within a row.
void check_positions(const Check& check, const RemaskParams& p) {
  std::vector<int32_t> sorted;
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t* row = p.position + b * p.W;
    int32_t last = -1;
    bool ascending = true;  // the usual window; ascending positions are distinct
    for (int64_t w = 0; w < p.W; ++w) {
      const int32_t at = row[w];
      check.that(at >= -1 && at < p.T, "position must be -1 or a canvas position below ", p.T,
                 "; got ", at, " at [", b, ", ", w, "]");
      if (at < 0) continue;
      ascending = ascending && at > last;
      last = at;
    }
    if (ascending) continue;
    sorted.assign(row, row + p.W);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t w = 1; w < p.W; ++w) {
      check.that(sorted[w] < 0 || sorted[w] != sorted[w - 1],
                 "position must be distinct within a row; got ", sorted[w], " twice in row ", b);
    }
  }
}

void check_ends(const Check& check, const RemaskParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t end = p.end.at(b, int32_t(p.T));
    check.that(end >= 0 && end <= p.T, "end must be from 0 to ", p.T, "; got ", end, " for row ",
               b);
  }
}

// No token id outside the vocabulary may be committed or edited in.
void check_proposals(const Check& check, const RemaskParams& p) {
  for (int64_t i = 0; i < p.B * p.W; ++i) {
    if (p.proposal[i] < p.vocab_size || p.position[i] < 0) continue;
    const int64_t row = i / p.W;
    const uint8_t state = p.state[row * p.T + p.position[i]];
    if (state & kStateFrozen || p.position[i] >= p.end.at(row, int32_t(p.T))) continue;
    const uint8_t* mask = state & kStateOpen ? p.commit : p.edit;
    check.that(!mask || !mask[i], "proposal must be below vocab_size = ", p.vocab_size, "; got ",
               p.proposal[i], " at [", row, ", ", i % p.W, "]");
  }
}

}  // namespace

Tensor remask_(const Tensor& tokens, const Tensor& state, const Tensor& position,
               const Tensor& proposal, const MaybeTensor& commit, const MaybeTensor& edit,
               const MaybeTensor& remask, const MaybeTensor& renoise, const MaybeTensor& confidence,
               const MaybeTensor& commit_step, const MaybeTensor& commit_confidence,
               const MaybeTensor& step, const MaybeTensor& seed, const MaybeTensor& origin,
               const MaybeTensor& end, int64_t mask_token_id, int64_t vocab_size,
               const std::vector<int64_t>& eos_token_ids, const std::string& eos_policy,
               int64_t fill_token_id) {
  const Check check("remask_", "tokens", tokens);
  RemaskParams p{};
  p.tokens = check.dense_mutable<int64_t>("tokens", tokens, {-1, -1});
  const int64_t B = p.B = tokens.size(0), T = p.T = tokens.size(1);
  p.state = check.dense_mutable<uint8_t>("state", state, {B, T});
  p.position = check.dense<int32_t>("position", position, {B, -1});
  const int64_t W = p.W = position.size(1);
  p.proposal = check.dense<int64_t>("proposal", proposal, {B, W});
  p.commit = check.mask("commit", commit, {B, W});
  p.edit = check.mask("edit", edit, {B, W});
  p.remask = check.mask("remask", remask, {B, W});
  p.renoise = check.mask("renoise", renoise, {B, W});
  p.confidence = check.dense<float>("confidence", confidence, {B, W});
  p.commit_step = check.dense_mutable<int32_t>("commit_step", commit_step, {B, T});
  p.commit_confidence = check.dense_mutable<float>("commit_confidence", commit_confidence, {B, T});
  p.step = check.dense_mutable<int32_t>("step", step, {B});
  p.seed = check.per_row<int64_t>("seed", seed, B);
  p.origin = check.per_row<int32_t>("origin", origin, B);
  p.end = check.per_row<int32_t>("end", end, B);

  check.that(W <= kMaxSlots, "position must have at most ", kMaxSlots, " slots (W); got W = ", W);
  check.that(T <= std::numeric_limits<int32_t>::max(),
             "tokens must have fewer than 2^31 canvas positions; got T = ", T);
  check.that(confidence || !commit_confidence || !(commit || edit),
             "confidence is required when commit_confidence is to be recorded; got None");
  check.that(mask_token_id >= 0 || !remask,
             "mask_token_id must be a token id when remask is given; got ", mask_token_id);
  check.that(vocab_size >= 0 && vocab_size <= std::numeric_limits<uint32_t>::max(),
             "vocab_size must be 0 (unknown) or up to 2^32 - 1; got ", vocab_size);
  check.that(seed || !renoise, "seed is required by renoise; got None");
  check.that(vocab_size > 0 || !renoise,
             "vocab_size must be at least 1 when renoise is given; got ", vocab_size);
  p.mask_token_id = mask_token_id;
  p.vocab_size = vocab_size;
  p.eos_token_ids = eos_token_ids.data();
  p.eos_count = int64_t(eos_token_ids.size());
  p.eos_policy = policy_named(check, eos_policy);
  p.fill_token_id = fill_token_id;
  check.that(fill_token_id >= 0 || p.eos_policy != EosPolicy::kFill,
             "fill_token_id must be a token id under eos_policy fill; got ", fill_token_id);
  if (tokens.is_cpu()) {
    check_positions(check, p);
    check_ends(check, p);
    if (vocab_size > 0 && (commit || edit)) check_proposals(check, p);
  }

  check.not_differentiable({{"confidence", confidence}, {"commit_confidence", commit_confidence}});
  check.written({{"tokens", tokens},
                 {"state", state},
                 {"commit_step", commit_step},
                 {"commit_confidence", commit_confidence},
                 {"step", step}},
                {{"position", position},
                 {"proposal", proposal},
                 {"commit", commit},
                 {"edit", edit},
                 {"remask", remask},
                 {"renoise", renoise},
                 {"confidence", confidence},
                 {"seed", seed},
                 {"origin", origin}});

  Tensor info = check.empty("info", {B, int64_t(kInfoColumns)}, ScalarType::Int);
  p.info = static_cast<int32_t*>(info.mutable_data_ptr());
  if (B == 0) return info;

#ifdef DLM_WITH_CUDA
  if (tokens.is_cuda()) {
    const CudaCall call(check, tokens);
    call.supports(cuda::unsupported_remask(p));
    call.succeeded(cuda::run_remask(p, call.stream()));
    return info;
  }
#endif

  // Waking a second thread pays off from about 50 microseconds of work: a position costs about a
  // nanosecond, a slot about ten.
  const int64_t grain = std::max<int64_t>(1, 50000 / std::max<int64_t>(T + 10 * W, 1));
  torch::stable::parallel_for(0, B, grain,
                              [&](int64_t begin, int64_t end) { cpu::remask(p, begin, end); });
  return info;
}

}  // namespace dlm
