// SPDX-License-Identifier: Apache-2.0
// Maximum of each row of a matrix, the lowest index where it stands, and the sum of the row.
//   grid (splits, rows), kThreads threads: a block reduces its share of the row's 16-byte chunks;
//   the last block of a row to arrive merges the shares, in order, so the result does not depend on
//   which block that is.
// A test of the tools more than of itself: `fault` plants one of the faults that the host tests
// must notice.
#pragma once
#include <climits>
#include <cmath>

#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

enum class RowFault {
  kNone,
  kMissingBarrier,
  kOverread,
  kSmemOverrun,
  kUnmaskedTail,
  kWrongSplits,
  kRelaxedCounter,
  kDivergentShuffle,
  kEarlyExit,
  kWrongMask,
};

struct RowPart {
  float maximum;
  int32_t index;
  float sum;
};

struct RowReduceParams {
  const BFloat16* x;  // [rows, stride], rows 16-byte aligned
  int64_t stride;
  int32_t columns, splits;
  RowPart* out;       // [rows]
  RowPart* part;      // [rows, splits]
  uint32_t* arrived;  // [rows], zero; left zero
};

constexpr int kRowThreads = 64;
constexpr SmemSize kRowSmem = SmemSize{}.take<RowPart>(kRowThreads / 32).take<uint32_t>(1);

DLM_DEVICE RowPart merge(RowPart a, RowPart b) {
  const bool take_b = b.maximum > a.maximum || (b.maximum == a.maximum && b.index < a.index);
  return {take_b ? b.maximum : a.maximum, take_b ? b.index : a.index, a.sum + b.sum};
}

template <RowFault fault>
DLM_DEVICE RowPart warp_merge(RowPart part) {
  const uint32_t mask = fault == RowFault::kWrongMask ? 0x7fffffffu : 0xffffffffu;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const RowPart other{__shfl_xor_sync(mask, part.maximum, distance),
                        __shfl_xor_sync(mask, part.index, distance),
                        __shfl_xor_sync(mask, part.sum, distance)};
    // Lower lanes first: both partners compute the same sum.
    part = threadIdx.x & distance ? merge(other, part) : merge(part, other);
  }
  return part;
}

template <RowFault fault>
__global__ void __launch_bounds__(kRowThreads)
    row_reduce_kernel(const __grid_constant__ RowReduceParams p) {
  SmemCarver smem;
  RowPart* of_warp = smem.take<RowPart>(kRowThreads / 32);
  uint32_t* is_last = smem.take<uint32_t>(1);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t row = blockIdx.y;
  const BFloat16* x = p.x + row * p.stride;

  // This block's chunks of 8 elements; the last one may be ragged.
  const int chunks = (p.columns + 7) / 8 + (fault == RowFault::kOverread ? 1 : 0);
  const int share = (chunks + p.splits - 1) / p.splits;
  const int begin = int(blockIdx.x) * share, end = min(begin + share, chunks);
  if (fault == RowFault::kEarlyExit && begin + warp * 32 >= end) return;

  RowPart mine{-INFINITY, INT_MAX, 0.0f};
  for (int chunk = begin + int(threadIdx.x); chunk < end; chunk += kRowThreads) {
    const uint4 v = ptx::ld_global_stream_16(x + chunk * 8);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const int valid = fault == RowFault::kUnmaskedTail ? 8 : p.columns - chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 pair = ptx::unpack_bf16(words[i / 2]);
      const float value = i % 2 ? pair.y : pair.x;
      if (i < valid) mine = merge(mine, {value, chunk * 8 + i, value});
    }
  }
  if (fault == RowFault::kDivergentShuffle) {
    if (lane < 20) mine = warp_merge<RowFault::kNone>(mine);
  } else {
    mine = warp_merge<fault>(mine);
  }

  if (lane == 0) of_warp[warp + (fault == RowFault::kSmemOverrun ? 1 : 0)] = mine;
  if (fault != RowFault::kMissingBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kRowThreads / 32; ++i) mine = merge(mine, of_warp[i]);
    p.part[row * p.splits + blockIdx.x] = mine;
    const uint32_t before = fault == RowFault::kRelaxedCounter
                                ? atomicAdd(&p.arrived[row], 1u)
                                : ptx::atomic_add_acq_rel(&p.arrived[row], 1);
    const int wanted = p.splits - (fault == RowFault::kWrongSplits ? 2 : 1);
    *is_last = int(before) == wanted;
    if (int(before) == p.splits - 1) p.arrived[row] = 0;
  }
  __syncthreads();
  if (!*is_last || threadIdx.x != 0) return;
  RowPart all = p.part[row * p.splits];
  for (int i = 1; i < p.splits; ++i) all = merge(all, p.part[row * p.splits + i]);
  p.out[row] = all;
}

template <RowFault fault = RowFault::kNone>
cudaError_t row_reduce(const RowReduceParams& p, int64_t rows, cudaStream_t stream) {
  return launch(row_reduce_kernel<fault>, dim3(unsigned(p.splits), unsigned(rows)),
                dim3(kRowThreads), kRowSmem.bytes, stream, p);
}

}  // namespace dlm::cuda
