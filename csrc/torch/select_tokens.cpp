// SPDX-License-Identifier: Apache-2.0
#include "torch/check.h"
#include "torch/ops.h"

namespace dlm {

std::tuple<Tensor, Tensor> select_tokens(
    const Tensor& score, const Tensor& eligible, const std::string& rule, const MaybeTensor& parameter, bool strict,
    const MaybeTensor& gate, const MaybeTensor& cost, const MaybeTensor& need, const MaybeTensor& fill,
    const MaybeTensor& cap, const MaybeTensor& order_temperature, const MaybeTensor& seed, const MaybeTensor& step,
    const MaybeTensor& position) { throw std::runtime_error("not built yet"); }

}  // namespace dlm
