// SPDX-License-Identifier: Apache-2.0
#include "cpu/remask.h"

namespace dlm::cpu {

void remask(const RemaskParams& p, int64_t begin, int64_t end) { generic::remask(p, begin, end); }

}  // namespace dlm::cpu
