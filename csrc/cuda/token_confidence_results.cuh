// SPDX-License-Identifier: Apache-2.0
// What is known of a row once its chunks are summarized, and the results that follow.
#pragma once
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

constexpr uint32_t kNoToken = 0xffffffffu;

// The sums exclude the argmax.
struct RowStatistics {
  uint32_t argmax = kNoToken;
  float max = -INFINITY, second = -INFINITY;
  double weight = 0.0, exponent = 0.0;
};
struct Drawn {
  uint32_t token = kNoToken;
  float logit = -INFINITY;
  uint32_t key = 0;  // of its chunk, as ordered bits
};

DLM_DEVICE double sum_over_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The id whose probability is requested for row n, or kNoToken, also if it is in another shard.
DLM_DEVICE uint32_t given_id(const TokenConfidenceParams& p, uint32_t n) {
  const int64_t given = p.given ? p.given[n] : -1;
  return given >= p.first && given < p.V ? uint32_t(given) : kNoToken;
}

// `given` is the logit of given_id, -inf if there is none. Called by one thread.
DLM_DEVICE void write_row(const TokenConfidenceParams& p, uint32_t n, const RowPlan& plan,
                          const RowStatistics& found, const Drawn& drawn, uint32_t flags,
                          float floor, float given) {
  int64_t token = -1, argmax = -1;
  double confidence = -INFINITY, margin = 0.0, entropy = 0.0, logsumexp = -INFINITY, p_given = 0.0;
  if (found.argmax != kNoToken) {
    const bool sampled = drawn.token != kNoToken;
    argmax = found.argmax;
    token = sampled ? drawn.token : found.argmax;
    const double scale =
        p.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(plan.temperature);
    const auto exponent = [&](float logit) { return (double(logit) - found.max) * scale; };
    const double total = 1.0 + found.weight, log_total = log1p(found.weight);
    confidence = (sampled ? exp(exponent(drawn.logit)) : 1.0) / total;
    margin = -expm1(exponent(found.second)) / total;
    entropy = log_total - found.exponent / total;
    logsumexp = found.max * scale + log_total;
    const bool counts = !plan.about_kept || given >= floor;
    p_given = counts ? exp(exponent(given)) / total : 0.0;
  }
  p.token[n] = token;
  p.argmax[n] = argmax;
  p.flags[n] = int32_t(flags);
  if (p.floor) p.floor[n] = floor;
  p.confidence[n] = float(confidence);
  p.logsumexp[n] = float(logsumexp);
  p.p_given[n] = float(p_given);
  if (p.margin) p.margin[n] = float(margin);
  if (p.entropy) p.entropy[n] = float(entropy);
}

}  // namespace dlm::cuda
