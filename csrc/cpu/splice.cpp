// SPDX-License-Identifier: Apache-2.0
#include "cpu/splice.h"

namespace dlm::cpu {

void splice(const SpliceParams& p, int64_t begin, int64_t end) { generic::splice(p, begin, end); }

}  // namespace dlm::cpu
