// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/params.h"

namespace dlm::cpu {

// Work items: tiles of kSoftRows rows by kSoftColumns columns, columns first.
constexpr int64_t kSoftRows = 8, kSoftColumns = 256;
inline int64_t soft_embedding_items(const SoftEmbeddingParams& p) {
  return (p.N + kSoftRows - 1) / kSoftRows * ((p.D + kSoftColumns - 1) / kSoftColumns);
}
void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end);

namespace generic {
void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end);
}  // namespace generic

}  // namespace dlm::cpu
