// SPDX-License-Identifier: Apache-2.0
#include "torch/check.h"
#include "torch/ops.h"

namespace dlm {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_confidence(
    const Tensor& logits, const MaybeTensor& row_map, const MaybeTensor& given, const MaybeTensor& uncond_logits,
    const MaybeTensor& cfg_scale, const MaybeTensor& bias, const MaybeTensor& banned, const MaybeTensor& bitmask,
    const MaybeTensor& temperature, const MaybeTensor& top_k, const MaybeTensor& top_p, bool top_p_first,
    bool keep_crossing, const std::string& distribution, const MaybeTensor& seed, const MaybeTensor& step,
    const MaybeTensor& position, bool with_margin, bool with_entropy) { throw std::runtime_error("not built yet"); }

}  // namespace dlm
