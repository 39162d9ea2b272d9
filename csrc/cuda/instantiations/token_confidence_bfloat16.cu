// SPDX-License-Identifier: Apache-2.0
#include "cuda/token_confidence.cuh"

namespace dlm::cuda {
template cudaError_t start_rows<BFloat16>(ConfidenceLaunch, cudaStream_t);
template cudaError_t start_scan<BFloat16, false>(const ConfidenceLaunch&, cudaStream_t);
}
