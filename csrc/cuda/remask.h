// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// RemaskParams::eos_token_ids points to host memory, as for all back ends: the ids are passed with
// the launch. If a row has two slots at the same position, the lower one is used and the other is
// unused; a position outside [0, T) is unused.

// Returns why these arguments are not supported, or null.
const char* unsupported_remask(const RemaskParams& p);

// Processes the whole batch in one launch; returns a cudaError_t.
int run_remask(const RemaskParams& p, void* stream);

}  // namespace dlm::cuda
