// SPDX-License-Identifier: Apache-2.0
// The sum of a chunk of 256 values over a warp, bit for bit as in common/race.h.
#pragma once
#include "common/race.h"
#include "cuda/block.cuh"

namespace dlm::cuda {

// Adds the values of two lanes that differ in bit `lane_bit`: the lower lane keeps the sums of the
// first half, the other lane those of the second.
template <int n>
DLM_DEVICE void halve(float (&e)[n], uint32_t lane_bit) {
  const bool upper = lane_index() & lane_bit;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, upper ? e[i] : e[i + n / 2], int(lane_bit));
    e[i] = add_rn(upper ? e[i + n / 2] : e[i], other);
  }
}
DLM_DEVICE float add_across(float e, uint32_t lane_bit) {
  return add_rn(e, __shfl_xor_sync(kAllLanes, e, int(lane_bit)));
}

// chunk_sum over a warp. Lane l has elements 8 l ... 8 l + 7, or with `two_runs` 4 l ... 4 l + 3
// and those 128 after them. Lanes that add the same pair of numbers get the same bits.
template <bool two_runs>
DLM_DEVICE float chunk_sum_over_warp(float (&e)[8]) {
  if constexpr (two_runs) {
    float half[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) half[j] = add_rn(e[j], e[j + 4]);
    halve<4>(half, 16);
    float (&pair)[2] = *reinterpret_cast<float (*)[2]>(half);
    halve<2>(pair, 8);
    float sum = pair[0];
    sum = add_across(add_across(add_across(sum, 4), 2), 1);
    return add_across(add_across(sum, 16), 8);
  } else {
    halve<8>(e, 16);
    float (&four)[4] = *reinterpret_cast<float (*)[4]>(e);
    halve<4>(four, 8);
    float (&pair)[2] = *reinterpret_cast<float (*)[2]>(e);
    halve<2>(pair, 4);
    const float sum = add_across(add_across(pair[0], 2), 1);
    return add_across(add_across(add_across(sum, 16), 8), 4);
  }
}

// Returns word `index` of a stream, given the counter that contains it.
DLM_DEVICE uint32_t word_of(const Philox4& r, uint32_t index) {
  const uint32_t low = index & 1 ? r.word[1] : r.word[0], high = index & 1 ? r.word[3] : r.word[2];
  return index & 2 ? high : low;
}

}  // namespace dlm::cuda
