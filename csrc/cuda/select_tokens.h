// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Returns why these arguments are not supported, or null.
const char* unsupported_select_tokens(const SelectTokensParams& p);

// Processes the whole batch in one launch; returns a cudaError_t.
int run_select_tokens(const SelectTokensParams& p, void* stream);

}  // namespace dlm::cuda
