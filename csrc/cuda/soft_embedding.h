// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Values are not checked here: a row out of range is unused. argmax and floor come from
// token_confidence.

// Why these arguments cannot be run, or null.
const char* unsupported_soft_embedding(const SoftEmbeddingParams& p);

// Bytes of scratch for the call, aligned to 16; it need not be cleared. A function of the shapes
// and of which arguments there are.
int64_t soft_embedding_workspace(const SoftEmbeddingParams& p);

// All rows: three launches, or two where logits are filtered; returns a cudaError_t.
int run_soft_embedding(const SoftEmbeddingParams& p, void* workspace, void* stream);

}  // namespace dlm::cuda
