// SPDX-License-Identifier: Apache-2.0
// One small kernel for each function of cuda/ptx.cuh and for the warp intrinsics: words in, words
// out, one warp unless it says otherwise. test_ptx.cpp compares each with its definition.
#pragma once
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

struct WrapperParams {
  const uint32_t* in;
  uint32_t *out, *scratch;
  int32_t n;
};

// in: for each lane the row whose address it gives, then 32 rows of 8 16-bit elements: 4 words.
template <int count, bool trans>
__global__ void ldmatrix_kernel(const __grid_constant__ WrapperParams p) {
  SmemCarver smem;
  uint32_t* rows = smem.take<uint32_t>(32 * 4);
  for (int i = 0; i < 4; ++i) rows[threadIdx.x * 4 + i] = p.in[32 + threadIdx.x * 4 + i];
  __syncwarp();
  uint32_t r[count];
  const uint32_t address = ptx::smem_address(rows + p.in[threadIdx.x] * 4);
  if (trans) {
    ptx::ldmatrix_trans(r, address);
  } else {
    ptx::ldmatrix(r, address);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) p.out[threadIdx.x * count + i] = r[i];
}

// in: for each lane 4 words of a, 2 of b, 4 of c; out: 4 words of c
template <bool bf16>
__global__ void mma_kernel(const __grid_constant__ WrapperParams p) {
  const uint32_t* in = p.in + threadIdx.x * 10;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[6 + i]);
  if (bf16) {
    ptx::mma_m16n8k16_bf16(c, a, in[4], in[5]);
  } else {
    ptx::mma_m16n8k16_f16(c, a, in[4], in[5]);
  }
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = __float_as_uint(c[i]);
}

// Each lane copies 3 pieces of 16 bytes in 3 groups, piece i valid if bit i of its flag is set, and
// reads them as they become complete. in: 32 flags, then 32 x 3 pieces.
__global__ void cp_async_kernel(const __grid_constant__ WrapperParams p) {
  SmemCarver smem;
  const int lane = int(threadIdx.x);
  const uint32_t mine = ptx::smem_address(smem.take<uint4>(32 * 3)) + uint32_t(lane) * 48;
  uint32_t* out = p.out + lane * 12;
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async_16(mine + uint32_t(i) * 16, p.in + 32 + (lane * 3 + i) * 4, p.in[lane] >> i & 1);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<2>();
  ptx::st_global_16(out, ptx::ld_shared_16(mine));
  ptx::cp_async_wait<1>();
  ptx::st_global_16(out + 4, ptx::ld_shared_16(mine + 16));
  ptx::cp_async_wait<0>();
  ptx::st_global_16(out + 8, ptx::ld_shared_16(mine + 32));
}

// Through shared memory, lanes reversed; the other half of the words by the two kinds of load.
__global__ void copy_16_kernel(const __grid_constant__ WrapperParams p) {
  SmemCarver smem;
  const uint32_t tile = ptx::smem_address(smem.take<uint4>(32));
  const int lane = int(threadIdx.x);
  ptx::st_shared_16(tile + uint32_t(lane) * 16, ptx::ld_global_stream_16(p.in + lane * 4));
  __syncwarp();
  ptx::st_global_16(p.out + lane * 4, ptx::ld_shared_16(tile + uint32_t(31 - lane) * 16));
  ptx::st_global_16(p.out + 128 + lane * 4, ptx::ld_global_16(p.in + 128 + lane * 4));
}

// out: exp2, log2, pack_bf16 with the neighbour, pack_f16, then unpack_bf16 and unpack_f16 of the
// word, max_nan of x and y, and of the two words as bf16 and f16 pairs: 11 a lane
__global__ void arithmetic_kernel(const __grid_constant__ WrapperParams p) {
  for (int i = int(threadIdx.x); i < p.n; i += 32) {
    const float x = __uint_as_float(p.in[i]), y = __uint_as_float(p.in[i ^ 1]);
    uint32_t* out = p.out + i * 11;
    out[0] = __float_as_uint(ptx::exp2_approx(x));
    out[1] = __float_as_uint(ptx::log2_approx(x));
    out[2] = ptx::pack_bf16(x, y);
    out[3] = ptx::pack_f16(x, y);
    const float2 a = ptx::unpack_bf16(p.in[i]), b = ptx::unpack_f16(p.in[i]);
    out[4] = __float_as_uint(a.x);
    out[5] = __float_as_uint(a.y);
    out[6] = __float_as_uint(b.x);
    out[7] = __float_as_uint(b.y);
    out[8] = __float_as_uint(ptx::max_nan(x, y));
    out[9] = ptx::max_nan_bf16(p.in[i], p.in[i ^ 1]);
    out[10] = ptx::max_nan_f16(p.in[i], p.in[i ^ 1]);
  }
}

// Each block publishes n words, counts itself, and the last one copies all. grid: as many blocks as
// wanted
__global__ void last_block_kernel(const __grid_constant__ WrapperParams p) {
  SmemCarver smem;
  uint32_t* is_last = smem.take<uint32_t>(1);
  uint32_t* counter = p.scratch;
  uint32_t* all = p.scratch + 1;
  for (int i = int(threadIdx.x); i < p.n; i += 32)
    all[blockIdx.x * p.n + i] = p.in[blockIdx.x * p.n + i] + 1;
  __syncthreads();
  if (threadIdx.x == 0) *is_last = ptx::atomic_add_acq_rel(counter, 1) == gridDim.x - 1;
  __syncthreads();
  if (!*is_last) return;
  for (int i = int(threadIdx.x); i < p.n * int(gridDim.x); i += 32) p.out[i] = all[i];
}

// Block 1 waits for block 0's message. grid 2, which must be resident together
__global__ void message_kernel(const __grid_constant__ WrapperParams p) {
  uint32_t* flag = p.scratch;
  uint32_t* message = p.scratch + 1;
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    for (int i = 0; i < p.n; ++i) message[i] = p.in[i] * 3;
    ptx::store_release(flag, 1);
  } else {
    while (ptx::load_acquire(flag) == 0) ptx::spin_pause();
    for (int i = 0; i < p.n; ++i) p.out[i] = message[i];
  }
}

// 3 warps: warp 0 fills a buffer and goes on, warps 1 and 2 wait for it, then warp 1 frees it for
// warp 0's next round.
__global__ void named_barrier_kernel(const __grid_constant__ WrapperParams p) {
  SmemCarver smem;
  uint32_t* buffer = smem.take<uint32_t>(32);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  constexpr uint32_t kFull = 1, kEmpty = 2;
  for (int round = 0; round < p.n; ++round) {
    if (warp == 0) {
      if (round > 0) ptx::barrier_sync(kEmpty, 96);
      buffer[lane] = p.in[round * 32 + lane];
      ptx::barrier_arrive(kFull, 96);
    } else {
      ptx::barrier_sync(kFull, 96);
      p.out[(round * 2 + warp - 1) * 32 + lane] = buffer[31 - lane];
      if (round + 1 < p.n) ptx::barrier_arrive(kEmpty, 96);
    }
  }
}

// out: 20 words a lane; what they are: see test_ptx.cpp
__global__ void warp_kernel(const __grid_constant__ WrapperParams p) {
  const unsigned all = ~0u;
  const uint32_t x = p.in[threadIdx.x];
  const int lane = int(threadIdx.x);
  uint32_t* out = p.out + lane * 20;
  out[0] = __shfl_xor_sync(all, x, 5);
  out[1] = __shfl_up_sync(all, x, 3);
  out[2] = __shfl_down_sync(all, x, 7);
  out[3] = __shfl_sync(all, x, int(x & 31));
  out[4] = __shfl_xor_sync(all, x, 3, 8);
  out[5] = __shfl_up_sync(all, x, 2, 16);
  out[6] = __shfl_down_sync(all, x, 1, 4);
  out[7] = __shfl_sync(all, x, 1, 8);
  out[8] = __float_as_uint(__shfl_xor_sync(all, __uint_as_float(x), 16));
  out[9] = __ballot_sync(all, int(x & 1));
  out[10] = uint32_t(__any_sync(all, x % 64 == 0));
  out[11] = uint32_t(__all_sync(all, x != 0));
  out[12] = __reduce_add_sync(all, x);
  out[13] = __reduce_min_sync(all, x);
  out[14] = __reduce_max_sync(all, x);
  out[15] = uint32_t(__reduce_min_sync(all, int(x)));
  out[16] = __reduce_and_sync(all, x);
  out[17] = __reduce_or_sync(all, x);
  out[18] = __reduce_xor_sync(all, x);
  out[19] = 0;
  if (lane < 12) out[19] = __shfl_xor_sync(0xfff, x, 1) + __ballot_sync(0xfff, x > 0x80000000u);
}

}  // namespace dlm::cuda
