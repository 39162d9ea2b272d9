// SPDX-License-Identifier: Apache-2.0
#include "cuda/lm_head_candidates.cuh"
#include "cuda/lm_head_confidence.cuh"

namespace dlm::cuda {

template cudaError_t start_head_scan<float>(const HeadLaunch&, cudaStream_t);
template cudaError_t start_head<float>(const LmHeadConfidenceParams&, void*, cudaStream_t);
template cudaError_t start_head<BFloat16>(const LmHeadConfidenceParams&, void*, cudaStream_t);
template cudaError_t start_head<Float16>(const LmHeadConfidenceParams&, void*, cudaStream_t);

const char* unsupported_lm_head_confidence(const LmHeadConfidenceParams& p) {
  return why_not_lm_head_confidence(p);
}

int64_t lm_head_confidence_workspace(const LmHeadConfidenceParams& p) { return head_workspace(p); }

int run_lm_head_confidence(const LmHeadConfidenceParams& p, void* workspace, void* stream) {
  return start_lm_head_confidence(p, workspace, static_cast<cudaStream_t>(stream));
}

// lm_head_candidates has no kernels of its own.

const char* unsupported_lm_head_candidates(const LmHeadCandidatesParams& p) {
  return why_not_lm_head_confidence(p.head);
}

int64_t lm_head_candidates_workspace(const LmHeadCandidatesParams& p) {
  return head_candidates_workspace(p);
}

int run_lm_head_candidates(const LmHeadCandidatesParams& p, void* workspace, void* stream) {
  return start_lm_head_candidates(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
