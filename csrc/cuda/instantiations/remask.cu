// SPDX-License-Identifier: Apache-2.0
#include "cuda/remask.cuh"

namespace dlm::cuda {

const char* unsupported_remask(const RemaskParams& p) { return why_not_remask(p); }

int run_remask(const RemaskParams& p, void* stream) {
  return start_remask(p, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
