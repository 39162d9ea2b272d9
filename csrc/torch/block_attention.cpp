// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/check.h"
#include "torch/ops.h"
#ifdef DLM_WITH_CUDA
#include "cuda/block_attention.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

void copy_strides(const Tensor& t, int64_t* strides) {
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

// Checks the slots of B batch rows with `rows` rows each.
void check_slots(const Check& check, const char* name, const int32_t* slots, int64_t rows,
                 const BlockAttentionParams& p) {
  for (int64_t i = 0; slots && i < p.B * rows; ++i) {
    check.that(slots[i] >= -1 && slots[i] < p.S, name, " must lie in [-1, ", p.S, "); got ",
               slots[i], " at [", i / rows, ", ", i % rows, "]");
  }
}

void check_cache_rows(const Check& check, const BlockAttentionParams& p, bool writes) {
  for (int64_t b = 0; p.cache_rows && b < p.B; ++b) {
    const int32_t row = p.cache_rows[b];
    check.that(row >= -1 && row < p.C, "cache_rows must lie in [-1, ", p.C, "); got ", row, " at ",
               b);
    const bool again = std::count(p.cache_rows, p.cache_rows + b, row) > 0;
    check.that(row < 0 || !writes || !again,
               "cache_rows must be distinct where k_new is written; got ", row, " again at ", b);
  }
}

void check_ranges(const Check& check, const BlockAttentionParams& p) {
  for (int64_t i = 0; p.kv_range && i < p.B * p.N * 2; ++i) {
    check.that(p.kv_range[i] >= 0 && p.kv_range[i] <= p.S, "kv_range must lie in [0, ", p.S,
               "]; got ", p.kv_range[i], " in batch row ", i / (p.N * 2));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> block_attention(
    const Tensor& q, const MaybeTensor& k_new, const MaybeTensor& v_new, const Tensor& k_cache,
    const Tensor& v_cache, const MaybeTensor& slots, const MaybeTensor& kv_range,
    int64_t causal_block, const MaybeTensor& block_origin, const MaybeTensor& q_limit,
    const MaybeTensor& k_order, int64_t window_left, int64_t window_right, double softcap,
    std::optional<double> scale, const MaybeTensor& cache_rows, const MaybeTensor& k_slots,
    const MaybeTensor& visible) {
  const Check check("block_attention", "q", q);
  check.that(k_new.has_value() == v_new.has_value(),
             "k_new and v_new must be given together; got only ", k_new ? "k_new" : "v_new");
  check.that(q_limit.has_value() == k_order.has_value(),
             "q_limit and k_order must be given together; got only ",
             q_limit ? "q_limit" : "k_order");

  check.dtype("q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("q", q, {-1, -1, -1, -1});
  check.rows_dense("q", q);
  auto like_q = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
    check.device(name, t);
    check.dtype(name, t, {q.scalar_type()});
    check.sizes(name, t, want);
    check.rows_dense(name, t);
  };
  BlockAttentionParams p{};
  p.dtype = element_type(q);
  p.B = q.size(0);
  p.Q = q.size(1);
  p.H = q.size(2);
  p.D = q.size(3);
  like_q("k_cache", k_cache, {cache_rows ? -1 : p.B, -1, -1, p.D});
  p.C = k_cache.size(0);
  p.S = k_cache.size(1);
  p.G = k_cache.size(2);
  like_q("v_cache", v_cache, {p.C, p.S, p.G, p.D});
  p.K = p.Q;
  if (k_new) {
    like_q("k_new", *k_new, {p.B, k_slots ? -1 : p.Q, p.G, p.D});
    p.K = k_new->size(1);
    like_q("v_new", *v_new, {p.B, p.K, p.G, p.D});
  }
  check.that(k_new || !k_slots, "k_new is required by k_slots; got None");
  check.that(k_new || !visible, "k_new is required by visible; got None");
  check.that(p.G > 0 && p.H > 0 && p.H % p.G == 0, "q must have a multiple of k_cache's heads (",
             p.G, "); got ", p.H);
  check.that(p.D > 0 && p.D % 8 == 0 && p.D <= cpu::kMaxHeadDim,
             "q must have a head dimension that is a multiple of 8 and at most ", cpu::kMaxHeadDim,
             "; got ", p.D);
  check.that(p.S <= std::numeric_limits<int32_t>::max(), "k_cache must have fewer than 2^31 slots");

  p.cache_rows = check.dense<int32_t>("cache_rows", cache_rows, {p.B});
  p.slots = check.dense<int32_t>("slots", slots, {p.B, p.Q});
  p.k_slots = check.dense<int32_t>("k_slots", k_slots, {p.B, p.K});
  p.visible = check.dense<int32_t>("visible", visible, {p.B, p.Q, (p.K + 31) / 32});
  if (kv_range) {
    const bool one_range = kv_range->dim() == 2;
    p.N = one_range ? 1 : kv_range->dim() == 3 ? kv_range->size(1) : -1;
    p.kv_range = one_range ? check.dense<int32_t>("kv_range", *kv_range, {p.B, 2})
                           : check.dense<int32_t>("kv_range", *kv_range, {p.B, -1, 2});
    check.that(p.N > 0,
               "kv_range must hold at least one range per batch row (it may be empty); got shape ",
               Check::shape(*kv_range));
  }
  p.block_origin = check.per_row<int32_t>("block_origin", block_origin, p.B);
  p.q_limit = check.dense<int32_t>("q_limit", q_limit, {p.B, p.Q});
  p.k_order = check.dense<int32_t>("k_order", k_order, {p.B, p.S});

  check.that(causal_block >= 0, "causal_block must be 0 (full), 1 (causal) or a block length; got ",
             causal_block);
  check.that(window_left >= -1, "window_left must be -1 (unbounded) or a number of slots; got ",
             window_left);
  check.that(window_right >= -1, "window_right must be -1 (unbounded) or a number of slots; got ",
             window_right);
  p.softcap = check.float_or_zero("softcap", softcap, "none");
  p.scale = check.finite_float("scale", scale.value_or(1.0 / std::sqrt(double(p.D))));
  // Larger values than the maximum distance between two slots (or a slot and an origin) make no
  // difference; clamping prevents sums from overflowing.
  p.causal_block = std::min(causal_block, int64_t(1) << 33);
  p.window_left = std::min(window_left, p.S);
  p.window_right = std::min(window_right, p.S);
  check.that(p.slots || p.Q <= p.S || p.B == 0, "slots must be given when q has more rows (", p.Q,
             ") than k_cache has slots (", p.S, ")");
  if (q.is_cpu()) {
    check_cache_rows(check, p, k_new.has_value());
    check_slots(check, "slots", p.slots, p.Q, p);
    check_slots(check, "k_slots", p.k_slots, p.K, p);
    check_ranges(check, p);
  }

  check.not_differentiable(
      {{"q", q}, {"k_new", k_new}, {"v_new", v_new}, {"k_cache", k_cache}, {"v_cache", v_cache}});
  if (k_new) {
    check.written({{"k_cache", k_cache}, {"v_cache", v_cache}}, {{"q", q},
                                                                 {"k_new", k_new},
                                                                 {"v_new", v_new},
                                                                 {"cache_rows", cache_rows},
                                                                 {"slots", slots},
                                                                 {"k_slots", k_slots},
                                                                 {"visible", visible},
                                                                 {"kv_range", kv_range},
                                                                 {"block_origin", block_origin},
                                                                 {"q_limit", q_limit},
                                                                 {"k_order", k_order}});
  }

  Tensor out = check.empty("out", {p.B, p.Q, p.H, p.D}, q.scalar_type());
  Tensor lse = check.empty("lse", {p.B, p.Q, p.H}, ScalarType::Float);
  if (p.B * std::max(p.Q, k_new ? p.K : 0) == 0) return {out, lse};

  p.q = q.const_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  copy_strides(q, p.q_stride);
  copy_strides(k_cache, p.k_cache_stride);
  copy_strides(v_cache, p.v_cache_stride);

  if (k_new) {
    p.k_new = k_new->const_data_ptr();
    p.v_new = v_new->const_data_ptr();
    copy_strides(*k_new, p.k_new_stride);
    copy_strides(*v_new, p.v_new_stride);
  }

#ifdef DLM_WITH_CUDA
  if (q.is_cuda()) {
    const CudaCall call(check, q);
    call.supports(cuda::unsupported_block_attention(p));
    Tensor workspace =
        check.empty("workspace", {cuda::block_attention_workspace(p)}, ScalarType::Float);
    call.succeeded(cuda::run_block_attention(p, static_cast<float*>(workspace.mutable_data_ptr()),
                                             call.stream()));
    return {out, lse};
  }
#endif

  // Waking a thread pays off for some tens of microseconds of work.
  if (k_new) {
    const int64_t grain =
        std::max<int64_t>(1, (int64_t(1) << 16) / (std::max<int64_t>(p.K, 1) * p.D));
    torch::stable::parallel_for(0, p.B * p.G, grain, [&](int64_t begin, int64_t end) {
      cpu::scatter_new_rows(p, begin, end);
    });
  }
  if (p.Q == 0) return {out, lse};
  const cpu::BlockAttentionKernels kernels = cpu::block_attention(p);
  const cpu::BlockAttentionWork work = kernels.work(p);
  Tensor workspace = check.empty("workspace", {work.workspace}, ScalarType::Float);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  auto grain = [&](int64_t items) {
    const int64_t products = p.B * p.Q * p.H * std::max<int64_t>(p.S, 1) * p.D / items;
    return std::max<int64_t>(1, kernels.grain / std::max<int64_t>(products, 1));
  };
  torch::stable::parallel_for(0, work.items, grain(work.items),
                              [&](int64_t begin, int64_t end) { kernels.attend(p, begin, end); });
  if (work.merge_items > 0) {
    torch::stable::parallel_for(0, work.merge_items, grain(work.merge_items),
                                [&](int64_t begin, int64_t end) { kernels.merge(p, begin, end); });
  }
  return {out, lse};
}

}  // namespace dlm
