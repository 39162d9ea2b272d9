// SPDX-License-Identifier: Apache-2.0
#include "torch/token_confidence.h"

#include <algorithm>

#include "cpu/token_confidence.h"
#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/token_confidence.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// Checks each value of a per-row parameter of `count` values.
template <class T, class Fact>
void check_values(const Check& check, const char* name, const MaybeTensor& t, const char* expected,
                  Fact fact) {
  if (!t) return;
  const T* values = static_cast<const T*>(t->const_data_ptr());
  for (int64_t i = 0; i < t->numel(); ++i) {
    if (!fact(values[i]))
      check.that(false, name, " must be ", expected, "; got ", values[i], " at ", i);
  }
}

Distribution distribution_named(const Check& check, const std::string& name) {
  if (name == "raw") return Distribution::kRaw;
  if (name == "tempered") return Distribution::kTempered;
  if (name == "filtered") return Distribution::kFiltered;
  check.that(false, "distribution must be raw, tempered or filtered; got ", name);
  return Distribution::kRaw;
}

}  // namespace

// Distributes whole rows if there are enough of them to keep the threads evenly busy, otherwise
// parts of rows.
void token_confidence_on_cpu(const Check& check, const TokenConfidenceParams& p) {
  const bool filters = p.top_k || p.top_p;
  if (p.N == 0) return;
  const int64_t parts = cpu::token_confidence_parts(p), grain = cpu::token_confidence_grain();
  const int64_t most = torch::stable::get_num_threads();
  const auto threads = [&](int64_t items, int64_t logits_an_item) {
    return std::clamp<int64_t>(items * logits_an_item / grain, 1, std::min(most, items));
  };
  Tensor sums =
      check.empty("workspace", {p.N * cpu::token_confidence_sums(p.V)}, ScalarType::Float);
  float* workspace = static_cast<float*>(sums.mutable_data_ptr());
  const bool whole = parts == 1 || p.N >= 4 * most;
  if (!whole) {
    torch::stable::parallel_for(
        0, p.N * parts, std::max<int64_t>(1, grain / cpu::kPart),
        [&](int64_t begin, int64_t end) { cpu::token_confidence_scan(p, workspace, begin, end); });
  }
  // Each share of the rows has its own scratch memory.
  const int64_t shares = threads(p.N, whole || filters ? p.columns() : 1);
  const int64_t bytes = filters ? cpu::token_confidence_scratch(p.V) : 0;
  Tensor scratch = check.empty("workspace", {shares * bytes / 8}, ScalarType::Long);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  const auto run = whole ? cpu::token_confidence : cpu::token_confidence_finish;
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(p, workspace, memory + i * bytes, p.N * i / shares, p.N * (i + 1) / shares);
  });
}

void run_token_confidence(const Check& check, const Tensor& anchor,
                          const TokenConfidenceParams& p) {
#ifdef DLM_WITH_CUDA
  if (anchor.is_cuda()) {
    const CudaCall call(check, anchor);
    call.supports(cuda::unsupported_token_confidence(p));
    Tensor workspace =
        check.empty("workspace", {cuda::token_confidence_workspace(p)}, ScalarType::Byte);
    call.succeeded(cuda::run_token_confidence(p, workspace.mutable_data_ptr(), call.stream()));
    return;
  }
#endif
  (void)anchor;
  token_confidence_on_cpu(check, p);
}

void check_confidence_arguments(const Check& check, const ConfidenceArguments& a, bool on_cpu,
                                const MaybeTensor& uncond, const char* uncond_name,
                                TokenConfidenceParams& p, int64_t ids) {
  p.row_map = check.dense<int32_t>("row_map", a.row_map, {-1});
  const int64_t N = p.N = a.row_map ? a.row_map->numel() : p.R;
  p.given = check.dense<int64_t>("given", a.given, {N});
  p.cfg_scale = check.per_row<float>("cfg_scale", a.cfg_scale, N);
  check.that(uncond || !a.cfg_scale, uncond_name, " is required by cfg_scale; got None");
  check.that(a.cfg_scale || !uncond, "cfg_scale is required by ", uncond_name, "; got None");

  p.bias = shared_rows<float>(check, "bias", a.bias, p.V, N, &p.bias_rows_per_value);
  check_bans(check, a.banned, a.bitmask, p);

  p.temperature = check.per_row<float>("temperature", a.temperature, N);
  p.top_k = check.per_row<int32_t>("top_k", a.top_k, N);
  p.top_p = check.per_row<float>("top_p", a.top_p, N);
  p.top_p_first = a.top_p_first;
  p.keep_crossing = a.keep_crossing;
  p.distribution = distribution_named(check, a.distribution);
  p.random.seed = check.per_row<int64_t>("seed", a.seed, N);
  p.random.step = check.per_row<int32_t>("step", a.step, N);
  p.random.position = check.dense<int32_t>("position", a.position, {N});
  p.random.redraw = check.per_row<int32_t>("redraw", a.redraw, N);
  check.that(a.seed || !a.temperature, "seed is required by temperature; got None");
  check.that(a.position || !a.seed, "position is required by seed; got None");
  check.that(a.seed || !a.redraw, "seed is required by redraw; got None");

  if (ids < 0) ids = p.V;
  if (on_cpu) {  // on CUDA, checking values would make the host wait for them
    check.indices("row_map", p.row_map, N, p.R);
    check.indices("given", p.given, N, ids);
    check.indices("banned", p.banned, a.banned ? a.banned->numel() : 0, ids);
    check.temperatures("temperature", a.temperature);
    check_values<int32_t>(check, "top_k", a.top_k, "0 (off) or positive",
                          [](int32_t k) { return k >= 0; });
    check_values<float>(check, "top_p", a.top_p, "in [0, 1]",
                        [](float q) { return q >= 0.0f && q <= 1.0f; });
    check_values<int32_t>(check, "redraw", a.redraw, "at least 0",
                          [](int32_t count) { return count >= 0; });
  }
}

ConfidenceResults::ConfidenceResults(const Check& check, bool with_margin, bool with_entropy,
                                     TokenConfidenceParams& p)
    : token(check.empty("token", {p.N}, ScalarType::Long)),
      argmax(check.empty("argmax", {p.N}, ScalarType::Long)),
      confidence(check.empty("confidence", {p.N}, ScalarType::Float)),
      margin(check.empty("margin", {with_margin ? p.N : 0}, ScalarType::Float)),
      entropy(check.empty("entropy", {with_entropy ? p.N : 0}, ScalarType::Float)),
      logsumexp(check.empty("logsumexp", {p.N}, ScalarType::Float)),
      p_given(check.empty("p_given", {p.N}, ScalarType::Float)),
      flags(check.empty("flags", {p.N}, ScalarType::Int)) {
  const auto write = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  p.token = static_cast<int64_t*>(token.mutable_data_ptr());
  p.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  p.confidence = write(confidence);
  p.margin = with_margin ? write(margin) : nullptr;
  p.entropy = with_entropy ? write(entropy) : nullptr;
  p.logsumexp = write(logsumexp);
  p.p_given = write(p_given);
  p.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_confidence(
    const Tensor& logits, const MaybeTensor& row_map, const MaybeTensor& given,
    const MaybeTensor& uncond_logits, const MaybeTensor& cfg_scale, const MaybeTensor& bias,
    const MaybeTensor& banned, const MaybeTensor& bitmask, const MaybeTensor& temperature,
    const MaybeTensor& top_k, const MaybeTensor& top_p, bool top_p_first, bool keep_crossing,
    const std::string& distribution, const MaybeTensor& seed, const MaybeTensor& step,
    const MaybeTensor& position, const MaybeTensor& redraw, bool with_margin, bool with_entropy) {
  const Check check("token_confidence", "logits", logits);
  TokenConfidenceParams p{};

  check.dtype("logits", logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("logits", logits, {-1, -1});
  check.rows_dense("logits", logits);
  p.R = logits.size(0), p.V = logits.size(1);
  if (p.V < 1)
    check.that(false, "logits must have at least one column; got ", Check::shape(logits));
  p.dtype = element_type(logits);
  p.logits = logits.const_data_ptr();
  p.logits_stride = logits.stride(0);

  if (uncond_logits) {
    check.device("uncond_logits", *uncond_logits);
    check.dtype("uncond_logits", *uncond_logits, {logits.scalar_type()});
    check.sizes("uncond_logits", *uncond_logits, {p.R, p.V});
    check.rows_dense("uncond_logits", *uncond_logits);
    p.uncond_logits = uncond_logits->const_data_ptr();
    p.uncond_stride = uncond_logits->stride(0);
  }
  check_confidence_arguments(
      check,
      {row_map, given, cfg_scale, bias, banned, bitmask, temperature, top_k, top_p, top_p_first,
       keep_crossing, distribution, seed, step, position, redraw},
      !logits.is_cuda(), uncond_logits, "uncond_logits", p);

  check.not_differentiable({{"logits", logits},
                            {"uncond_logits", uncond_logits},
                            {"cfg_scale", cfg_scale},
                            {"bias", bias},
                            {"temperature", temperature},
                            {"top_p", top_p}});

  const ConfidenceResults results(check, with_margin, with_entropy, p);
  if (p.N > 0) run_token_confidence(check, logits, p);
  return results.all();
}

}  // namespace dlm
