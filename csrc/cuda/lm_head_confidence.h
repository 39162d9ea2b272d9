// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a source row outside [0, R) is unused, an id outside [0, V) is
// ignored.

// Returns why these arguments are not supported, or null.
const char* unsupported_lm_head_confidence(const LmHeadConfidenceParams& p);

// Bytes of scratch memory for the call, aligned to 16; it need not be cleared. Depends only on the
// shapes and on which arguments are given; at most 8,000,000 unless a single row needs more.
int64_t lm_head_confidence_workspace(const LmHeadConfidenceParams& p);

// Processes all rows: two launches for each group of rows that fits into the workspace, six or more
// with filters; returns a cudaError_t.
int run_lm_head_confidence(const LmHeadConfidenceParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
