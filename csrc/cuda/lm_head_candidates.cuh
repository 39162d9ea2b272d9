// SPDX-License-Identifier: Apache-2.0
// top_candidates of logits = hidden states times an LM head. The logits of a group of rows, as many
// as fit into 8 MB, are computed by lm_head_confidence's product and stored for top_candidates'
// kernels. A row's bits do not depend on its group. Bytes: the weights once per group.
#pragma once
#include "cuda/lm_head_candidates.h"
#include "cuda/lm_head_confidence.cuh"
#include "cuda/top_candidates.cuh"

namespace dlm::cuda {

#ifndef DLM_SIMT
extern template cudaError_t start_candidates<float>(const CandidatesLaunch&, cudaStream_t);
extern template cudaError_t start_candidates<BFloat16>(const CandidatesLaunch&, cudaStream_t);
extern template cudaError_t start_candidates<Float16>(const CandidatesLaunch&, cudaStream_t);
#endif

inline int64_t head_candidates_workspace(const LmHeadCandidatesParams& p) {
  return head_workspace(p.head, true);
}

template <class T>
cudaError_t start_head_candidates(const LmHeadCandidatesParams& p, void* workspace,
                                  cudaStream_t stream) {
  return start_head_groups<T>(
      p.head, true, workspace, stream, [&](const HeadLaunch& job, const HeadWorkspace& memory) {
        return start_candidates<T>(
            {kept_rows(job, memory), uint32_t(p.k), p.ids, p.values, p.logsumexp}, stream);
      });
}

// `workspace` has head_candidates_workspace(p) bytes, aligned to 16.
inline cudaError_t start_lm_head_candidates(const LmHeadCandidatesParams& p, void* workspace,
                                            cudaStream_t stream) {
  const DType dtype = p.head.rows.dtype;
  if (p.head.rows.N == 0) return cudaSuccess;
  if (dtype == DType::kFloat32) return start_head_candidates<float>(p, workspace, stream);
  if (dtype == DType::kFloat16) return start_head_candidates<Float16>(p, workspace, stream);
  return start_head_candidates<BFloat16>(p, workspace, stream);
}

}  // namespace dlm::cuda
