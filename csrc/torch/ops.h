// SPDX-License-Identifier: Apache-2.0
// The ops as C++ functions: each checks its arguments, allocates its outputs, fills its params
// struct and calls a back end. The shape, dtype and meaning of every argument are documented in
// python/dlmkernels/ops.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace dlm {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> block_attention(
    const Tensor& q, const MaybeTensor& k_new, const MaybeTensor& v_new, const Tensor& k_cache,
    const Tensor& v_cache, const MaybeTensor& slots, const MaybeTensor& kv_range,
    int64_t causal_block, const MaybeTensor& block_origin, const MaybeTensor& q_limit,
    const MaybeTensor& k_order, int64_t window_left, int64_t window_right, double softcap,
    std::optional<double> scale, const MaybeTensor& cache_rows, const MaybeTensor& k_slots,
    const MaybeTensor& visible);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_confidence(
    const Tensor& logits, const MaybeTensor& row_map, const MaybeTensor& given,
    const MaybeTensor& uncond_logits, const MaybeTensor& cfg_scale, const MaybeTensor& bias,
    const MaybeTensor& banned, const MaybeTensor& bitmask, const MaybeTensor& temperature,
    const MaybeTensor& top_k, const MaybeTensor& top_p, bool top_p_first, bool keep_crossing,
    const std::string& distribution, const MaybeTensor& seed, const MaybeTensor& step,
    const MaybeTensor& position, const MaybeTensor& redraw, bool with_margin, bool with_entropy);

std::tuple<Tensor, Tensor> select_tokens(const Tensor& score, const Tensor& eligible,
                                         const std::string& rule, const MaybeTensor& parameter,
                                         bool strict, const MaybeTensor& gate,
                                         const MaybeTensor& cost, const MaybeTensor& need,
                                         const MaybeTensor& fill, const MaybeTensor& cap,
                                         const MaybeTensor& order_temperature,
                                         const MaybeTensor& seed, const MaybeTensor& step,
                                         const MaybeTensor& position);

Tensor remask_(const Tensor& tokens, const Tensor& state, const Tensor& position,
               const Tensor& proposal, const MaybeTensor& commit, const MaybeTensor& edit,
               const MaybeTensor& remask, const MaybeTensor& renoise, const MaybeTensor& confidence,
               const MaybeTensor& commit_step, const MaybeTensor& commit_confidence,
               const MaybeTensor& step, const MaybeTensor& seed, const MaybeTensor& origin,
               const MaybeTensor& end, int64_t mask_token_id, int64_t vocab_size,
               const std::vector<int64_t>& eos_token_ids, const std::string& eos_policy,
               int64_t fill_token_id);

std::tuple<Tensor, Tensor> verify_drafts(
    const Tensor& drafts, const Tensor& token, const MaybeTensor& logits,
    const MaybeTensor& logsumexp, const MaybeTensor& row_map, const MaybeTensor& draft_logits,
    const MaybeTensor& draft_logsumexp, const MaybeTensor& draft_row_map, const MaybeTensor& banned,
    const MaybeTensor& temperature, double leniency, const MaybeTensor& seed,
    const MaybeTensor& step, const MaybeTensor& position);

std::tuple<Tensor, Tensor> splice_(const Tensor& tokens, const Tensor& start,
                                   const MaybeTensor& insert, const MaybeTensor& remove,
                                   const MaybeTensor& length, const MaybeTensor& end,
                                   const MaybeTensor& state, const MaybeTensor& commit_step,
                                   const MaybeTensor& commit_confidence, int64_t fill_token_id,
                                   int64_t pad_token_id);

Tensor soft_embedding(const Tensor& logits, const Tensor& weight, const MaybeTensor& row_map,
                      const MaybeTensor& temperature, const MaybeTensor& top_k,
                      int64_t mask_token_id);

std::tuple<Tensor, Tensor, Tensor> top_candidates(const Tensor& logits, int64_t k,
                                                  const MaybeTensor& row_map,
                                                  const MaybeTensor& banned,
                                                  const MaybeTensor& bitmask);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lm_head_confidence(
    const Tensor& hidden, const Tensor& weight, const MaybeTensor& row_map,
    const MaybeTensor& given, const MaybeTensor& uncond_hidden, const MaybeTensor& cfg_scale,
    const MaybeTensor& bias, const MaybeTensor& banned, const MaybeTensor& bitmask,
    const MaybeTensor& temperature, const MaybeTensor& top_k, const MaybeTensor& top_p,
    bool top_p_first, bool keep_crossing, const std::string& distribution, const MaybeTensor& seed,
    const MaybeTensor& step, const MaybeTensor& position, const MaybeTensor& redraw,
    bool with_margin, bool with_entropy);

std::tuple<Tensor, Tensor, Tensor> lm_head_candidates(const Tensor& hidden, const Tensor& weight,
                                                      int64_t k, const MaybeTensor& row_map,
                                                      const MaybeTensor& banned,
                                                      const MaybeTensor& bitmask);

Tensor shard_confidence(const Tensor& logits, int64_t first, const MaybeTensor& weight,
                        const MaybeTensor& row_map, const MaybeTensor& given,
                        const MaybeTensor& uncond, const MaybeTensor& cfg_scale,
                        const MaybeTensor& bias, const MaybeTensor& banned,
                        const MaybeTensor& bitmask, const MaybeTensor& temperature,
                        const std::string& distribution, const MaybeTensor& seed,
                        const MaybeTensor& step, const MaybeTensor& position,
                        const MaybeTensor& redraw, bool with_entropy);

}  // namespace dlm
