// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row whose start is outside the canvas is left alone, a length or
// an end beyond the canvas counts as T, and a negative count as 0.

// Returns why these arguments are not supported, or null.
const char* unsupported_splice(const SpliceParams& p);

// Processes the whole batch in one launch; returns a cudaError_t.
int run_splice(const SpliceParams& p, void* stream);

}  // namespace dlm::cuda
