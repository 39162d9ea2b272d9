// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a source row outside [0, R) is unused, an id outside [0, V) is
// ignored.

// Returns why these arguments are not supported, or null.
const char* unsupported_token_confidence(const TokenConfidenceParams& p);

// Bytes of scratch memory for the call, aligned to 16; it need not be cleared. Depends only on the
// shapes and on which arguments are given.
int64_t token_confidence_workspace(const TokenConfidenceParams& p);

// Processes all rows: two launches, four with filters; returns a cudaError_t.
int run_token_confidence(const TokenConfidenceParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
