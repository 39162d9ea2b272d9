// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a source row outside [0, R) is unused, an id outside [0, V) is none.

// Why these arguments cannot be run, or null.
const char* unsupported_token_confidence(const TokenConfidenceParams& p);

// Bytes of scratch for the call, aligned to 16; it need not be cleared. A function of the shapes
// and of which arguments there are.
int64_t token_confidence_workspace(const TokenConfidenceParams& p);

// All rows: two launches, four where there are filters; returns a cudaError_t.
int run_token_confidence(const TokenConfidenceParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
