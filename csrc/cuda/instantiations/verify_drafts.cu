// SPDX-License-Identifier: Apache-2.0
#include "cuda/verify_drafts.cuh"

namespace dlm::cuda {

const char* unsupported_verify_drafts(const VerifyDraftsParams& p) {
  return why_not_verify_drafts(p);
}

int64_t verify_drafts_workspace(const VerifyDraftsParams& p) { return verify_workspace(p); }

int run_verify_drafts(const VerifyDraftsParams& p, void* workspace, void* stream) {
  return start_verify_drafts(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
