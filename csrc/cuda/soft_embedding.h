// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row out of range is unused. argmax and floor come from
// token_confidence.

// Returns why these arguments are not supported, or null.
const char* unsupported_soft_embedding(const SoftEmbeddingParams& p);

// Bytes of scratch memory for the call, aligned to 16; it need not be cleared. Depends only on the
// shapes and on which arguments are given.
int64_t soft_embedding_workspace(const SoftEmbeddingParams& p);

// Processes all rows: three launches, or two if logits are filtered; returns a cudaError_t.
int run_soft_embedding(const SoftEmbeddingParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
