// SPDX-License-Identifier: Apache-2.0
// Bitonic sort (Batcher, "Sorting networks and their applications", AFIPS 1968) of 64-bit keys held
// in the registers of a block. A thread owns kKeys consecutive places. Partners in the same thread
// compare in registers, partners in the same warp by shuffles, all others through shared memory: 15
// of the 78 steps that sort 4096 keys with 1024 threads.
#pragma once
#include "cuda/block.cuh"

namespace dlm::cuda {

// Orders places `at` and `at ^ stride`, where `at` is the lower one.
DLM_DEVICE void order_pair(uint64_t& low, uint64_t& high, bool descending) {
  const uint64_t a = low, b = high;
  const bool swap = (a > b) != descending;
  low = swap ? b : a;
  high = swap ? a : b;
}

// blockDim.x is a power of two, at least 32; `exchange` holds one key per place. Afterwards thread
// t has the keys of rank kKeys * t and following, smallest first.
template <int kKeys>
DLM_DEVICE void block_sort(uint64_t (&key)[kKeys], uint64_t* exchange) {
  const uint32_t places = blockDim.x * kKeys, first = threadIdx.x * kKeys;
#pragma unroll
  for (uint32_t size = 2; size <= kKeys; size *= 2) {
#pragma unroll
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (uint32_t k = 0; k < kKeys; ++k) {
        if (!(k & stride)) order_pair(key[k], key[k | stride], (first | k) & size);
      }
    }
  }
  for (uint32_t size = 2 * kKeys; size <= places; size *= 2) {
    const bool descending = first & size;
    for (uint32_t distance = size / kKeys / 2; distance > 0; distance /= 2) {
      const bool keep_smaller = !(threadIdx.x & distance) != descending;
      if (distance >= 32) {
        // wait until all threads have read in the previous step
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kKeys; ++k) exchange[k * blockDim.x + threadIdx.x] = key[k];
        __syncthreads();
      }
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const uint64_t other = distance >= 32 ? exchange[k * blockDim.x + (threadIdx.x ^ distance)]
                                              : __shfl_xor_sync(kAllLanes, key[k], int(distance));
        if ((other < key[k]) == keep_smaller) key[k] = other;
      }
    }
#pragma unroll
    for (uint32_t stride = kKeys / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (uint32_t k = 0; k < kKeys; ++k) {
        if (!(k & stride)) order_pair(key[k], key[k | stride], descending);
      }
    }
  }
}

}  // namespace dlm::cuda
