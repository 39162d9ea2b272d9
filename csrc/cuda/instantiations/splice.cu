// SPDX-License-Identifier: Apache-2.0
#include "cuda/splice.cuh"

namespace dlm::cuda {

const char* unsupported_splice(const SpliceParams& p) { return why_not_splice(p); }

int run_splice(const SpliceParams& p, void* stream) {
  return start_splice(p, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
