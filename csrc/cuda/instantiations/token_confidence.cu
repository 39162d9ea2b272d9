// SPDX-License-Identifier: Apache-2.0
#include "cuda/token_confidence.cuh"

namespace dlm::cuda {

template cudaError_t start_rows<float>(ConfidenceLaunch, cudaStream_t);
template cudaError_t start_scan<float, false>(const ConfidenceLaunch&, cudaStream_t);

const char* unsupported_token_confidence(const TokenConfidenceParams& p) {
  return why_not_token_confidence(p);
}

int64_t token_confidence_workspace(const TokenConfidenceParams& p) { return workspace_of(p); }

int run_token_confidence(const TokenConfidenceParams& p, void* workspace, void* stream) {
  return start_token_confidence(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
