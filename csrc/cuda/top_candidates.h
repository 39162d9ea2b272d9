// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a source row outside [0, R) is unused, an id outside [0, V) is
// ignored.

// Returns why these arguments are not supported, or null.
const char* unsupported_top_candidates(const TopCandidatesParams& p);

// Bytes of scratch memory for the call, aligned to 16; it need not be cleared.
int64_t top_candidates_workspace(const TopCandidatesParams& p);

// Processes all rows in two launches; returns a cudaError_t.
int run_top_candidates(const TopCandidatesParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
