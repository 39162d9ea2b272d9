// SPDX-License-Identifier: Apache-2.0
#include "cpu/shard_confidence.h"

#include "common/shard.h"
#include "torch/check.h"
#include "torch/ops.h"
#include "torch/token_confidence.h"

namespace dlm {
namespace {

constexpr int64_t kMostTokens = int64_t(1) << 31;

// The address that element 0 would have in an array whose element `first` is at `at`.
const void* before(const void* at, int64_t first, int64_t size) {
  return at ? reinterpret_cast<const void*>(uintptr_t(at) - uintptr_t(first) * uintptr_t(size))
            : nullptr;
}
template <class T>
const T* before(const T* at, int64_t first) {
  return static_cast<const T*>(before(at, first, sizeof(T)));
}

// Shifts parameters of the shard's own vocabulary to its place in the whole vocabulary.
void place(TokenConfidenceParams& p, int64_t first) {
  const int64_t size = element_size(p.dtype);
  p.first = first;
  p.V += first;
  p.logits = before(p.logits, first, size);
  p.uncond_logits = before(p.uncond_logits, first, size);
  p.bias = before(p.bias, first);
  p.bitmask = before(p.bitmask, first / 32);
}

}  // namespace

Tensor shard_confidence(const Tensor& logits, int64_t first, const MaybeTensor& weight,
                        const MaybeTensor& row_map, const MaybeTensor& given,
                        const MaybeTensor& uncond, const MaybeTensor& cfg_scale,
                        const MaybeTensor& bias, const MaybeTensor& banned,
                        const MaybeTensor& bitmask, const MaybeTensor& temperature,
                        const std::string& distribution, const MaybeTensor& seed,
                        const MaybeTensor& step, const MaybeTensor& position,
                        const MaybeTensor& redraw, bool with_entropy) {
  const Check check("shard_confidence", "logits", logits);
  LmHeadConfidenceParams head{};
  TokenConfidenceParams& p = head.rows;
  check.dtype("logits", logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("logits", logits, {-1, -1});
  check.rows_dense("logits", logits);
  const int64_t columns = logits.size(1);
  const auto like_logits = [&](const char* name, const Tensor& t, int64_t rows) {
    check.device(name, t);
    check.dtype(name, t, {logits.scalar_type()});
    check.sizes(name, t, {rows, columns});
    check.rows_dense(name, t);
    return t.const_data_ptr();
  };
  p.R = logits.size(0), p.V = weight ? weight->size(0) : columns;
  p.dtype = element_type(logits);
  if (weight) {
    head.D = columns;
    head.weight = like_logits("weight", *weight, -1);
    head.weight_stride = weight->stride(0);
    head.hidden = logits.const_data_ptr();
    head.hidden_stride = logits.stride(0);
  } else {
    p.logits = logits.const_data_ptr();
    p.logits_stride = logits.stride(0);
  }
  if (uncond) {
    const void* data = like_logits("uncond", *uncond, p.R);
    (weight ? head.uncond_hidden : p.uncond_logits) = data;
    (weight ? head.uncond_stride : p.uncond_stride) = uncond->stride(0);
  }
  check.that(p.V >= 1,
             weight ? "weight must have at least one row; got "
                    : "logits must have at least one column; got ",
             Check::shape(weight ? *weight : logits));
  check.that(first >= 0 && first % kRaceChunk == 0 && first <= kMostTokens - p.V,
             "first must be a multiple of ", kRaceChunk, " from 0 to ", kMostTokens,
             " less the shard's tokens; got ", first);
  const MaybeTensor none;
  check_confidence_arguments(check,
                             {row_map, given, cfg_scale, bias, banned, bitmask, temperature, none,
                              none, false, true, distribution, seed, step, position, redraw},
                             !logits.is_cuda(), uncond, "uncond", p, kMostTokens);
  check.not_differentiable({{"logits", logits},
                            {"weight", weight},
                            {"uncond", uncond},
                            {"cfg_scale", cfg_scale},
                            {"bias", bias},
                            {"temperature", temperature}});

  Tensor partial = check.empty("partial", {p.N, kShardWords}, ScalarType::Long);
  p.partial = static_cast<int64_t*>(partial.mutable_data_ptr());
  float wanted;  // never written; being non-null requests entropies
  p.entropy = with_entropy ? &wanted : nullptr;
  if (p.N == 0) return partial;
  place(p, first);
  if (weight) {
    head.weight = before(head.weight, first * head.weight_stride, element_size(p.dtype));
    run_lm_head_confidence(check, logits, head);
  } else {
    run_token_confidence(check, logits, p);
  }
  return partial;
}

}  // namespace dlm
