// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cpu {

// Processes rows [begin, end) of the batch.
void splice(const SpliceParams& p, int64_t begin, int64_t end);

namespace generic {
void splice(const SpliceParams& p, int64_t begin, int64_t end);
}  // namespace generic

}  // namespace dlm::cpu
