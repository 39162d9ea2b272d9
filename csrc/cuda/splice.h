// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a start off the canvas is that of an idle row, a length or an end
// beyond it is T, and a negative count is 0.

// Why these arguments cannot be run, or null.
const char* unsupported_splice(const SpliceParams& p);

// The whole batch in one launch; returns a cudaError_t.
int run_splice(const SpliceParams& p, void* stream);

}  // namespace dlm::cuda
