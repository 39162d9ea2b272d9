// SPDX-License-Identifier: Apache-2.0
// Reductions over a block of up to 32 whole warps, and per-row parameters.
#pragma once
#include "common/params.h"
#include "cuda/device.h"

namespace dlm::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kMaxWarps = 32;

DLM_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }
DLM_DEVICE uint32_t warp_index() { return threadIdx.x / 32; }

// PerRow::at without a 64-bit division: rows are the blocks of a grid, so there are fewer than
// 2^31.
template <class T>
DLM_DEVICE T row_value(const PerRow<T>& values, uint32_t row, T absent) {
  return values.data ? values.data[row / uint32_t(values.rows_per_value)] : absent;
}

struct Sum {
  static constexpr uint32_t kNeutral = 0;
  static DLM_DEVICE uint32_t over_warp(uint32_t v) { return __reduce_add_sync(kAllLanes, v); }
};
struct Least {
  static constexpr uint32_t kNeutral = 0xffffffffu;
  static DLM_DEVICE uint32_t over_warp(uint32_t v) { return __reduce_min_sync(kAllLanes, v); }
};
struct Union {
  static constexpr uint32_t kNeutral = 0;
  static DLM_DEVICE uint32_t over_warp(uint32_t v) { return __reduce_or_sync(kAllLanes, v); }
};
struct Greatest {
  static constexpr uint32_t kNeutral = 0;
  static DLM_DEVICE uint32_t over_warp(uint32_t v) { return __reduce_max_sync(kAllLanes, v); }
};

// A reduction in two halves, so that several reductions can share the barrier between them.
// `partial` has kMaxWarps entries and is used only by this reduction.
template <class Op>
DLM_DEVICE void leave_partial(uint32_t value, uint32_t* partial) {
  value = Op::over_warp(value);
  if (lane_index() == 0) partial[warp_index()] = value;
}
template <class Op>
DLM_DEVICE uint32_t gather_partials(const uint32_t* partial) {
  return Op::over_warp(lane_index() < blockDim.x / 32 ? partial[lane_index()] : Op::kNeutral);
}

template <class Op>
DLM_DEVICE uint32_t block_reduce(uint32_t value, uint32_t* partial) {
  leave_partial<Op>(value, partial);
  __syncthreads();
  return gather_partials<Op>(partial);
}

}  // namespace dlm::cuda
