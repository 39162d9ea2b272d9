// SPDX-License-Identifier: Apache-2.0
#include "cpu/soft_embedding.h"

namespace dlm::cpu {

void soft_embedding(const SoftEmbeddingParams& p, int64_t begin, int64_t end) {
  generic::soft_embedding(p, begin, end);
}

}  // namespace dlm::cpu
