// SPDX-License-Identifier: Apache-2.0
#include "cuda/top_candidates.cuh"

namespace dlm::cuda {

template cudaError_t start_candidates<float>(const CandidatesLaunch&, cudaStream_t);
template cudaError_t start_candidates<BFloat16>(const CandidatesLaunch&, cudaStream_t);
template cudaError_t start_candidates<Float16>(const CandidatesLaunch&, cudaStream_t);

const char* unsupported_top_candidates(const TopCandidatesParams& p) {
  return why_not_token_confidence(p.rows);
}

int64_t top_candidates_workspace(const TopCandidatesParams& p) { return workspace_of(p.rows); }

int run_top_candidates(const TopCandidatesParams& p, void* workspace, void* stream) {
  return start_top_candidates(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
