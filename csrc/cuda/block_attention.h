// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Why these arguments cannot be run, or null.
const char* unsupported_block_attention(const BlockAttentionParams& p);

// Scratch that run_block_attention needs, in floats; a function of the shapes alone.
int64_t block_attention_workspace(const BlockAttentionParams& p);

// Scatter and attend: two launches, four where there are many new rows; returns a cudaError_t.
// `workspace` is 16-byte aligned and may hold anything.
int run_block_attention(const BlockAttentionParams& p, float* workspace, void* stream);

}  // namespace dlm::cuda
