// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row out of range is none, a draft beyond the vocabulary fails.

// Why these arguments cannot be run, or null.
const char* unsupported_verify_drafts(const VerifyDraftsParams& p);

// Scratch that run_verify_drafts needs, in bytes; a function of the shapes alone.
int64_t verify_drafts_workspace(const VerifyDraftsParams& p);

// The whole batch, in one launch or, by ratio, two; returns a cudaError_t. `workspace` is 16-byte
// aligned and may hold anything.
int run_verify_drafts(const VerifyDraftsParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
