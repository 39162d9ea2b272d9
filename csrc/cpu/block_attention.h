// SPDX-License-Identifier: Apache-2.0
// Block attention on the CPU: run scatter_new_rows over all its items, then block_attention over
// all of its own.
#pragma once
#include <cstdint>

#include "common/params.h"

namespace dlm::cpu {

// Longest head dimension of the kernels: their scratch lies on the stack.
constexpr int64_t kMaxHeadDim = 256;

// Writes k_new and v_new into the cache. Items: B * G.
void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end);

int64_t block_attention_items(const BlockAttentionParams& params);
void block_attention(const BlockAttentionParams& params, int64_t begin, int64_t end);

namespace generic {
void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end);
int64_t block_attention_items(const BlockAttentionParams& params);
void block_attention(const BlockAttentionParams& params, int64_t begin, int64_t end);
}  // namespace generic

}  // namespace dlm::cpu
