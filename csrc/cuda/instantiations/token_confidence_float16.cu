// SPDX-License-Identifier: Apache-2.0
#include "cuda/token_confidence.cuh"

namespace dlm::cuda {
template cudaError_t start_rows<Float16>(ConfidenceLaunch, cudaStream_t);
template cudaError_t start_scan<Float16, false>(const ConfidenceLaunch&, cudaStream_t);
}
