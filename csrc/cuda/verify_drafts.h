// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row out of range counts as missing, a draft outside the vocabulary
// fails.

// Returns why these arguments are not supported, or null.
const char* unsupported_verify_drafts(const VerifyDraftsParams& p);

// Scratch memory that run_verify_drafts needs, in bytes; depends only on the shapes.
int64_t verify_drafts_workspace(const VerifyDraftsParams& p);

// Processes the whole batch in one launch or, by ratio, two; returns a cudaError_t. `workspace` is
// 16-byte aligned and may hold anything.
int run_verify_drafts(const VerifyDraftsParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
