// SPDX-License-Identifier: Apache-2.0
#include "cuda/soft_embedding.cuh"

namespace dlm::cuda {

const char* unsupported_soft_embedding(const SoftEmbeddingParams& p) {
  return why_not_soft_embedding(p);
}

int64_t soft_embedding_workspace(const SoftEmbeddingParams& p) { return soft_workspace_of(p); }

int run_soft_embedding(const SoftEmbeddingParams& p, void* workspace, void* stream) {
  return start_soft_embedding(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
