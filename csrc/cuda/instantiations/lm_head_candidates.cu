// SPDX-License-Identifier: Apache-2.0
#include "cuda/lm_head_candidates.cuh"

namespace dlm::cuda {

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
