// SPDX-License-Identifier: Apache-2.0
#include "cuda/select_tokens.cuh"

namespace dlm::cuda {

const char* unsupported_select_tokens(const SelectTokensParams& p) {
  return why_not_select_tokens(p);
}

int run_select_tokens(const SelectTokensParams& p, void* stream) {
  return start_select_tokens(p, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
