// SPDX-License-Identifier: Apache-2.0
#include "cuda/lm_head_confidence_launch.cuh"

namespace dlm::cuda {
template cudaError_t start_head_scan<Float16>(const HeadLaunch&, cudaStream_t);
}
