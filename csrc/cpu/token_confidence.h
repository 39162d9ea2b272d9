// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cpu {

// Output rows [begin, end).
void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end);

namespace generic {
void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end);
}  // namespace generic

}  // namespace dlm::cpu
