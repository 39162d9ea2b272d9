// SPDX-License-Identifier: Apache-2.0
#include "torch/check.h"
#include "torch/ops.h"

namespace dlm {

Tensor remask_(
    const Tensor& tokens, const Tensor& state, const Tensor& position, const Tensor& proposal,
    const MaybeTensor& commit, const MaybeTensor& edit, const MaybeTensor& remask, const MaybeTensor& renoise,
    const MaybeTensor& confidence, const MaybeTensor& commit_step, const MaybeTensor& commit_confidence,
    const MaybeTensor& step, const MaybeTensor& seed, const MaybeTensor& origin, int64_t mask_token_id,
    int64_t vocab_size, const std::vector<int64_t>& eos_token_ids, const std::string& eos_policy,
    int64_t fill_token_id) { throw std::runtime_error("not built yet"); }

}  // namespace dlm
