// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_attention.cuh"
template cudaError_t dlm::cuda::start_attend<dlm::Float16, 512>(const AttendParams&, cudaStream_t);
