// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// RemaskParams::eos_token_ids points to host memory, here as everywhere: the ids travel with the
// launch. Where a row has two slots at one position, the lower one acts and the other is unused; a
// position outside [0, T) is unused.

// Why these arguments cannot be run, or null.
const char* unsupported_remask(const RemaskParams& p);

// The whole batch in one launch; returns a cudaError_t.
int run_remask(const RemaskParams& p, void* stream);

}  // namespace dlm::cuda
