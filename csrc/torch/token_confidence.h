// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"
#include "torch/check.h"

namespace dlm {

// The rows of checked parameters, in torch's threads and memory.
void token_confidence_on_cpu(const Check& check, const TokenConfidenceParams& p);

}  // namespace dlm
