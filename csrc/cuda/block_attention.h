// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cuda {

// Returns why these arguments are not supported, or null.
const char* unsupported_block_attention(const BlockAttentionParams& p);

// Scratch memory that run_block_attention needs, in floats; depends only on the shapes.
int64_t block_attention_workspace(const BlockAttentionParams& p);

// Scatters and attends: two launches, four if there are many new rows; returns a cudaError_t.
// `workspace` is 16-byte aligned and may hold anything.
int run_block_attention(const BlockAttentionParams& p, float* workspace, void* stream);

}  // namespace dlm::cuda
