// SPDX-License-Identifier: Apache-2.0
// c[M,N] = a[M,K] b[N,K]^T, bf16 in, float out, on tensor cores.
//   grid (N / 16, M / 32), 2 warps: a warp owns 16 x 16 of c. Tiles of 32 columns of a and b come
//   by cp.async, double buffered; ldmatrix feeds mma.m16n8k16; results leave through shared memory,
//   16 bytes a lane.
// A test of the tools more than of itself: `fault` plants one of the faults that the host tests
// must notice.
#pragma once
#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

enum class TileFault {
  kNone,
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse,
  kLaxWait,
  kSwappedRegisters,
  kOverread,
  kSmemOverrun,
  kUnmaskedTail,
  kMissingSyncwarp,
  kDivergentBarrier,
  kNoSwizzle,  // right, but slow
};

struct TileProductParams {
  const BFloat16 *a, *b;  // [M, stride], [N, stride], rows 16-byte aligned
  int64_t stride;
  int32_t M, N, K;  // N a multiple of 4, K of 8
  float* c;         // [M, N]
};

constexpr int kTileM = 32, kTileN = 16, kTileK = 32, kTileThreads = 64;
constexpr int kTileRowBytes = kTileK * 2;
constexpr SmemSize kTileSmem = SmemSize{}
                                   .take<BFloat16>(2 * kTileM * kTileK)
                                   .take<BFloat16>(2 * kTileN * kTileK)
                                   .take<float>(kTileM * kTileN);

// Byte offset of a 16-byte chunk in a tile. Two rows fill the 32 banks; the exclusive or spreads
// eight rows over them.
template <TileFault fault>
DLM_DEVICE uint32_t tile_offset(int row, int chunk) {
  if (fault == TileFault::kNoSwizzle) return uint32_t(row * kTileRowBytes + chunk * 16);
  return uint32_t(row * kTileRowBytes + (chunk ^ (row / 2 & 3)) * 16);
}

// Starts copying rows of `x` from `row0`, columns from `k0`, into a tile; what lies outside becomes
// zero.
template <int rows, TileFault fault>
DLM_DEVICE void load_tile(uint32_t tile, const BFloat16* x, int64_t stride, int row0, int row_limit,
                          int k0, int K) {
  constexpr int kChunks = kTileK / 8;
  constexpr int kTurns = rows * kChunks / kTileThreads + (fault == TileFault::kSmemOverrun ? 1 : 0);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kTileThreads + int(threadIdx.x), row = i / kChunks, chunk = i % kChunks;
    const bool row_valid = row0 + row < row_limit || fault == TileFault::kOverread;
    const bool valid = row_valid && (k0 + chunk * 8 < K || fault == TileFault::kUnmaskedTail);
    const BFloat16* source = valid ? x + (row0 + row) * stride + k0 + chunk * 8 : x;
    ptx::cp_async_16(tile + tile_offset<fault>(row, chunk), source, valid);
  }
}

template <TileFault fault>
__global__ void __launch_bounds__(kTileThreads)
    tile_product_kernel(const __grid_constant__ TileProductParams p) {
  SmemCarver smem;
  const uint32_t a_tiles = ptx::smem_address(smem.take<BFloat16>(2 * kTileM * kTileK));
  const uint32_t b_tiles = ptx::smem_address(smem.take<BFloat16>(2 * kTileN * kTileK));
  float* c_tile = smem.take<float>(kTileM * kTileN);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int m0 = int(blockIdx.y) * kTileM, n0 = int(blockIdx.x) * kTileN;
  const int steps = (p.K + kTileK - 1) / kTileK;

  const auto load_step = [&](int step) {
    const uint32_t stage = uint32_t(step & 1);
    load_tile<kTileM, fault>(a_tiles + stage * kTileM * kTileRowBytes, p.a, p.stride, m0, p.M,
                             step * kTileK, p.K);
    constexpr TileFault b_fault = fault == TileFault::kSmemOverrun ? TileFault::kNone : fault;
    load_tile<kTileN, b_fault>(b_tiles + stage * kTileN * kTileRowBytes, p.b, p.stride, n0, p.N,
                               step * kTileK, p.K);
    ptx::cp_async_commit();
  };

  float acc[2][4] = {};
  load_step(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load_step(step + 1);
    } else {
      ptx::cp_async_commit();  // an empty group, so that "all but the last" is always this step's
    }
    ptx::cp_async_wait<fault == TileFault::kLaxWait ? 2 : 1>();
    if (fault == TileFault::kDivergentBarrier) {
      if (warp == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (fault != TileFault::kNoBarrierAfterWait) {
      __syncthreads();
    }
    const uint32_t a_tile = a_tiles + uint32_t(step & 1) * kTileM * kTileRowBytes;
    const uint32_t b_tile = b_tiles + uint32_t(step & 1) * kTileN * kTileRowBytes;
#pragma unroll
    for (int k = 0; k < kTileK / 8; k += 2) {
      uint32_t a[4], b[4];
      ptx::ldmatrix(a, a_tile + tile_offset<fault>(warp * 16 + lane % 16, k + lane / 16));
      ptx::ldmatrix(b, b_tile + tile_offset<fault>(lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      if (fault == TileFault::kSwappedRegisters) {
        const uint32_t swap = a[1];
        a[1] = a[2];
        a[2] = swap;
      }
      ptx::mma_m16n8k16_bf16(acc[0], a, b[0], b[1]);
      ptx::mma_m16n8k16_bf16(acc[1], a, b[2], b[3]);
    }
    if (fault != TileFault::kNoBarrierBeforeReuse) __syncthreads();
  }

  // Each warp turns its own 16 x 16 results into rows.
  float* mine = c_tile + warp * 16 * kTileN;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      mine[(lane / 4 + r / 2 * 8) * kTileN + i * 8 + lane % 4 * 2 + r % 2] = acc[i][r];
  }
  if (fault != TileFault::kMissingSyncwarp) __syncwarp();
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    const int row = turn * 8 + lane / 4, column = lane % 4 * 4;
    const uint4 v = ptx::ld_shared_16(ptx::smem_address(mine + row * kTileN + column));
    const int m = m0 + warp * 16 + row, n = n0 + column;
    if (m < p.M && n < p.N) ptx::st_global_16(p.c + int64_t(m) * p.N + n, v);
  }
}

template <TileFault fault = TileFault::kNone>
cudaError_t tile_product(const TileProductParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.N + kTileN - 1) / kTileN, unsigned(p.M + kTileM - 1) / kTileM);
  return launch(tile_product_kernel<fault>, grid, dim3(kTileThreads), kTileSmem.bytes, stream, p);
}

}  // namespace dlm::cuda
