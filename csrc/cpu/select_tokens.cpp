// SPDX-License-Identifier: Apache-2.0
#include "cpu/select_tokens.h"

namespace dlm::cpu {

void select_tokens(const SelectTokensParams& p, int64_t begin, int64_t end) {
  generic::select_tokens(p, begin, end);
}

}  // namespace dlm::cpu
