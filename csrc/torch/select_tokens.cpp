// SPDX-License-Identifier: Apache-2.0
#include "cpu/select_tokens.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/select_tokens.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

struct RuleName {
  const char* name;
  Rule rule;
  bool parameter, cost, random;  // arguments that the rule requires
};
constexpr RuleName kRules[] = {
    {"none", Rule::kNone, false, false, false},
    {"all", Rule::kAll, false, false, false},
    {"threshold", Rule::kThreshold, true, false, false},
    {"factor", Rule::kFactor, true, false, false},
    {"entropy-bound", Rule::kEntropyBound, true, true, false},
    {"entropy-sum", Rule::kEntropySum, true, true, false},
    {"bernoulli", Rule::kBernoulli, false, true, true},
};

const RuleName& rule_named(const Check& check, const std::string& name) {
  for (const RuleName& known : kRules) {
    if (name == known.name) return known;
  }
  std::string names;
  for (const RuleName& known : kRules) names += text(names.empty() ? "" : ", ", known.name);
  check.that(false, "rule must be one of ", names, "; got ", name);
  return kRules[0];
}

}  // namespace

std::tuple<Tensor, Tensor> select_tokens(const Tensor& score, const Tensor& eligible,
                                         const std::string& rule, const MaybeTensor& parameter,
                                         bool strict, const MaybeTensor& gate,
                                         const MaybeTensor& cost, const MaybeTensor& need,
                                         const MaybeTensor& fill, const MaybeTensor& cap,
                                         const MaybeTensor& order_temperature,
                                         const MaybeTensor& seed, const MaybeTensor& step,
                                         const MaybeTensor& position) {
  const Check check("select_tokens", "score", score);
  SelectTokensParams p{};
  p.score = check.dense<float>("score", score, {-1, -1});
  const int64_t B = p.B = score.size(0), W = p.W = score.size(1);
  p.eligible = check.mask("eligible", eligible, {B, W});
  p.parameter = check.per_row<float>("parameter", parameter, B);
  p.strict = strict;
  p.gate = check.mask("gate", gate, {B, W});
  p.cost = check.dense<float>("cost", cost, {B, W});
  p.need = check.per_row<int32_t>("need", need, B);
  p.fill = check.per_row<int32_t>("fill", fill, B);
  p.cap = check.per_row<int32_t>("cap", cap, B);
  p.order_temperature = check.per_row<float>("order_temperature", order_temperature, B);
  p.random.seed = check.per_row<int64_t>("seed", seed, B);
  p.random.step = check.per_row<int32_t>("step", step, B);
  p.random.position = check.dense<int32_t>("position", position, {B, W});
  check.that(W <= kMaxSlots, "score must have at most ", kMaxSlots, " slots (W); got W = ", W);

  const RuleName& named = rule_named(check, rule);
  p.rule = named.rule;
  check.that(parameter || !named.parameter, "parameter is required by rule ", rule, "; got None");
  check.that(cost || !named.cost, "cost is required by rule ", rule, "; got None");
  const bool random = named.random || order_temperature;
  const char* drawn_by = named.random ? "rule bernoulli" : "order_temperature";
  check.that(seed || !random, "seed is required by ", drawn_by, "; got None");
  check.that(position || !random, "position is required by ", drawn_by, "; got None");

  Tensor selected = check.empty("selected", {B, W}, ScalarType::Bool);
  Tensor count = check.empty("count", {B}, ScalarType::Int);
  p.selected = static_cast<bool*>(selected.mutable_data_ptr());
  p.count = static_cast<int32_t*>(count.mutable_data_ptr());
  if (B == 0) return {selected, count};

#ifdef DLM_WITH_CUDA
  if (score.is_cuda()) {
    const CudaCall call(check, score);
    call.supports(cuda::unsupported_select_tokens(p));
    call.succeeded(cuda::run_select_tokens(p, call.stream()));
    return {selected, count};
  }
#endif

  // Waking a second thread pays off from about 50 microseconds of work: a slot costs one or two
  // nanoseconds, about ten if slots are sorted, more if random numbers are drawn.
  const bool sorts =
      p.rule == Rule::kFactor || p.rule == Rule::kEntropyBound || p.rule == Rule::kEntropySum;
  const int64_t slots = random ? 1024 : sorts ? 4096 : 32768;
  const int64_t grain = std::max<int64_t>(1, slots / std::max<int64_t>(W, 1));
  torch::stable::parallel_for(
      0, B, grain, [&](int64_t begin, int64_t end) { cpu::select_tokens(p, begin, end); });
  return {selected, count};
}

}  // namespace dlm
