// SPDX-License-Identifier: Apache-2.0
#include "torch/check.h"
#include "torch/ops.h"

namespace dlm {

std::tuple<Tensor, Tensor> block_attention(
    const Tensor& q, const MaybeTensor& k_new, const MaybeTensor& v_new, const Tensor& k_cache, const Tensor& v_cache,
    const MaybeTensor& slots, const MaybeTensor& kv_range, int64_t causal_block, const MaybeTensor& block_origin,
    const MaybeTensor& q_limit, const MaybeTensor& k_order, int64_t window_left, int64_t window_right, double softcap,
    std::optional<double> scale) { throw std::runtime_error("not built yet"); }

}  // namespace dlm
