// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_attention.cuh"
template cudaError_t dlm::cuda::start_attend<float, 32>(const AttendParams&, cudaStream_t);
template cudaError_t dlm::cuda::start_attend<float, 64>(const AttendParams&, cudaStream_t);
template cudaError_t dlm::cuda::start_attend<float, 128>(const AttendParams&, cudaStream_t);
template cudaError_t dlm::cuda::start_attend<float, 256>(const AttendParams&, cudaStream_t);
template cudaError_t dlm::cuda::start_attend<float, 512>(const AttendParams&, cudaStream_t);
