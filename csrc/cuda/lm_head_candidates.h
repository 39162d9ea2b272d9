// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a source row outside [0, R) is unused, an id outside [0, V) is none.

// Why these arguments cannot be run, or null.
const char* unsupported_lm_head_candidates(const LmHeadCandidatesParams& p);

// Bytes of scratch for the call, aligned to 16; it need not be cleared. A function of the shapes;
// at most 8,000,000 unless a single row needs more.
int64_t lm_head_candidates_workspace(const LmHeadCandidatesParams& p);

// All rows: three launches for as many rows as the workspace has room for; returns a cudaError_t.
int run_lm_head_candidates(const LmHeadCandidatesParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
