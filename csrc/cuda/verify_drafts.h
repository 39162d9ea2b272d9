// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row out of range is none, a draft beyond the vocabulary fails.

// Why these arguments cannot be run, or null.
const char* unsupported_verify_drafts(const VerifyDraftsParams& p);

// The whole batch in one launch; returns a cudaError_t.
int run_verify_drafts(const VerifyDraftsParams& p, void* stream);

}  // namespace dlm::cuda
