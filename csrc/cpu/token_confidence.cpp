// SPDX-License-Identifier: Apache-2.0
#include "cpu/token_confidence.h"

namespace dlm::cpu {

void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end) {
  generic::token_confidence(p, begin, end);
}

}  // namespace dlm::cpu
