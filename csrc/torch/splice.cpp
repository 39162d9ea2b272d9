// SPDX-License-Identifier: Apache-2.0
#include "cpu/splice.h"

#include <algorithm>
#include <limits>

#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/splice.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// Checks values on the CPU, where reading them does not make the host wait.
void check_values(const Check& check, const SpliceParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const auto within = [&](const char* name, int64_t value, int64_t least) {
      check.that(value >= least && value <= p.T, name, " must be in [", least, ", ", p.T, "]; got ",
                 value, " in row ", b);
    };
    within("start", p.start[b], -1);
    if (p.length) within("length", p.length[b], 0);
    within("end", p.end.at(b, int32_t(p.T)), 0);
  }
  for (int64_t i = 0; p.insert && i < p.B * p.W; ++i) {
    if (p.insert[i] >= 0) continue;
    check.that(false, "insert must not be negative; got ", p.insert[i], " at [", i / p.W, ", ",
               i % p.W, "]");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> splice_(const Tensor& tokens, const Tensor& start,
                                   const MaybeTensor& insert, const MaybeTensor& remove,
                                   const MaybeTensor& length, const MaybeTensor& end,
                                   const MaybeTensor& state, const MaybeTensor& commit_step,
                                   const MaybeTensor& commit_confidence, int64_t fill_token_id,
                                   int64_t pad_token_id) {
  const Check check("splice_", "tokens", tokens);
  SpliceParams p{};
  p.tokens = check.dense_mutable<int64_t>("tokens", tokens, {-1, -1});
  const int64_t B = p.B = tokens.size(0), T = p.T = tokens.size(1);
  p.start = check.dense<int32_t>("start", start, {B});
  p.insert = check.dense<int32_t>("insert", insert, {B, -1});
  if (insert) p.W = insert->size(1);
  p.remove = check.mask("remove", remove, {B, insert ? p.W : -1});
  if (remove) p.W = remove->size(1);
  p.length = check.dense_mutable<int32_t>("length", length, {B});
  p.end = check.per_row<int32_t>("end", end, B);
  p.state = check.dense_mutable<uint8_t>("state", state, {B, T});
  p.commit_step = check.dense_mutable<int32_t>("commit_step", commit_step, {B, T});
  p.commit_confidence = check.dense_mutable<float>("commit_confidence", commit_confidence, {B, T});
  check.that(p.W <= kMaxSlots, insert ? "insert" : "remove", " must have at most ", kMaxSlots,
             " slots (W); got W = ", p.W);
  check.that(T <= std::numeric_limits<int32_t>::max(),
             "tokens must have fewer than 2^31 canvas positions; got T = ", T);
  check.that(!length || !end, "end must be None when length is given");
  check.that(fill_token_id >= 0 || !(insert || (remove && !length)),
             "fill_token_id must be a token id when ", insert ? "insert" : "remove",
             " is given; got ", fill_token_id);
  check.that(pad_token_id >= 0 || !(remove && length),
             "pad_token_id must be a token id when remove and length are given; got ",
             pad_token_id);
  p.fill_token_id = fill_token_id;
  p.pad_token_id = pad_token_id;
  if (tokens.is_cpu()) check_values(check, p);

  check.not_differentiable({{"commit_confidence", commit_confidence}});
  check.written({{"tokens", tokens},
                 {"length", length},
                 {"state", state},
                 {"commit_step", commit_step},
                 {"commit_confidence", commit_confidence}},
                {{"start", start}, {"insert", insert}, {"remove", remove}, {"end", end}});

  Tensor source = check.empty("source", {B, T}, ScalarType::Int);
  Tensor info = check.empty("info", {B, int64_t(kSpliceColumns)}, ScalarType::Int);
  p.source = static_cast<int32_t*>(source.mutable_data_ptr());
  p.info = static_cast<int32_t*>(info.mutable_data_ptr());
  if (B == 0) return {source, info};

#ifdef DLM_WITH_CUDA
  if (tokens.is_cuda()) {
    const CudaCall call(check, tokens);
    call.supports(cuda::unsupported_splice(p));
    call.succeeded(cuda::run_splice(p, call.stream()));
    return {source, info};
  }
#endif

  // Waking a second thread pays off from about 50 microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 25000 / std::max<int64_t>(T + p.W, 1));
  torch::stable::parallel_for(0, B, grain,
                              [&](int64_t begin, int64_t end) { cpu::splice(p, begin, end); });
  return {source, info};
}

}  // namespace dlm
