// SPDX-License-Identifier: Apache-2.0
// The interface between a kernel and the platform: the CUDA toolkit or, with DLM_SIMT, the
// substitutes in tests/cpp/simt, which run the same source on the host. A kernel file includes
// this, cuda/ptx.cuh and csrc/common.
//
//   launch       the only way to start a kernel
//   SmemCarver   the only way to get shared memory; SmemSize adds up the same takes on the host
//
// Static __shared__ arrays are not used, because the host tests could neither poison them nor guard
// their bounds.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef DLM_SIMT
#include "simt/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define DLM_DEVICE __device__ __forceinline__

namespace dlm::cuda {

// Swizzled tiles need 128-byte alignment; every take starts at such a boundary.
constexpr uint32_t kSmemAlign = 128;

// Number of bytes of dynamic shared memory used by the same sequence of takes in the kernel.
struct SmemSize {
  uint32_t bytes = 0;
  template <class T>
  constexpr SmemSize take(uint32_t count) const {
    return {(bytes + kSmemAlign - 1) / kSmemAlign * kSmemAlign + count * uint32_t(sizeof(T))};
  }
};

#ifdef DLM_SIMT

using simt::SmemCarver;

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t,
                   const Params& params) {
  return simt::launch(kernel, grid, block, smem_bytes, params);
}

#else

// Hands out dynamic shared memory in order; all threads make the same takes. Offsets are folded
// into constants.
class SmemCarver {
 public:
  template <class T>
  DLM_DEVICE T* take(uint32_t count) {
    extern __shared__ __align__(1024) unsigned char dlm_dynamic_smem[];
    const uint32_t at = (used_ + kSmemAlign - 1) / kSmemAlign * kSmemAlign;
    used_ = at + count * uint32_t(sizeof(T));
    return reinterpret_cast<T*>(dlm_dynamic_smem + at);
  }

 private:
  uint32_t used_ = 0;
};

// Starts `kernel(params)`. Kernels take a single struct by value, `const __grid_constant__ Params`.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, const Params& params) {
  if (smem_bytes > 48 * 1024) {  // above the default limit, the kernel has to opt in
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

#endif

}  // namespace dlm::cuda
