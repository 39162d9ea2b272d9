// SPDX-License-Identifier: Apache-2.0
// What the attention kernels on tensor cores share: the two products of a warp, and the handling of
// values that these leave out. Fragments are those of mma.m16n8k16: a lane has rows lane/4 and
// lane/4 + 8 of a block of 16, and of every 8 columns 2 (lane%4) and the next. Instructions: sm_80
// (mma.sync, ldmatrix).
#pragma once
#include "cuda/block_attention_parts.cuh"

namespace dlm::cuda {

// The lowest bit of the exponent in both halves of a word; adding it to an exponent of all ones
// overflows into the sign.
template <class T>
constexpr uint32_t kExponentUnits = std::is_same_v<T, BFloat16> ? 0x00800080u : 0x04000400u;
template <class T>
constexpr uint32_t kExponents = 0x80008000u - kExponentUnits<T>;

// Returns the sign bits of the elements that are NaN or infinite.
template <class T>
DLM_DEVICE uint32_t not_finite(uint32_t pair) {
  return ((pair & kExponents<T>)+kExponentUnits<T>)&0x80008000u;
}

// Which of the slots starting at `slot` each row sees.
template <class Mask>
struct Sight {
  const AttendParams& p;
  const RowLimits& limits;
  int64_t b;
  int32_t slot;
  Mask bits;

  // Before the order is applied.
  DLM_DEVICE Mask of(int row) const {
    const Mask seen = bits & bits_between<Mask>(limits.low[row] - slot, limits.high[row] - slot);
    return p.hidden ? seen & ~hidden_slots<Mask>(p, b, limits.query[row], slot) : seen;
  }
  DLM_DEVICE bool in_order(int row, int key) const {
    return is_in_order(p.op, b, limits.query[row], slot + key);
  }
};

// Sets logits to -inf where a row (counted from `row`) does not see a slot.
template <int kBlocks16, int kTiles8, class Mask>
DLM_DEVICE void mask_logits(Scores<kBlocks16, kTiles8>& s, int row, const Sight<Mask>& sight) {
  const int lane = int(threadIdx.x) % 32, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + i * 16 + half * 8 + lane / 4;
      const Mask seen = sight.of(own) >> column;
#pragma unroll
      for (int j = 0; j < kTiles8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + e;
          const bool visible = (seen >> key & 1) && sight.in_order(own, column + key);
          if (!visible) s[i][j][half * 2 + e] = -INFINITY;
        }
      }
    }
  }
}

// The maximum over the four lanes that share a row.
DLM_DEVICE float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DLM_DEVICE float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sums of 16 * kBlocks16 rows and 8 * kColumns8 columns.
template <int kBlocks16, int kColumns8>
using Sums = float[kBlocks16][kColumns8][4];

template <int kBlocks16, int kColumns8>
DLM_DEVICE void shrink_sums(Sums<kBlocks16, kColumns8>& sums, const float (&by)[kBlocks16][2]) {
#pragma unroll
  for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
    for (int d = 0; d < kColumns8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][d][e] *= by[i][e / 2];
    }
  }
}

// sums += weights v for 16 slots, whose rows of v start at `v_row` (a row_start of the warp's first
// columns). With `masked`, a row must not even multiply by zero what it does not see: NaN and
// infinities count as 0, and `poison` becomes nonzero if there are any.
template <class T, bool masked, int kBlocks16, int kColumns8>
DLM_DEVICE void multiply_values(Sums<kBlocks16, kColumns8>& sums,
                                const uint32_t (&weights)[kBlocks16][4], uint32_t v_row,
                                uint32_t& poison) {
#pragma unroll
  for (int d = 0; d < kColumns8 / 2; ++d) {
    uint32_t v[4];
    ptx::ldmatrix_trans(v, chunk_from(v_row, d * 2));
    if (masked) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t wrong = not_finite<T>(v[e]);
        v[e] &= ~((wrong >> 15) * 0xffffu);
        poison |= wrong;
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
      mma<T>(sums[i][d * 2], weights[i], v[0], v[1]);
      mma<T>(sums[i][d * 2 + 1], weights[i], v[2], v[3]);
    }
  }
}

// Adds what multiply_values left out of `keys` slots, for the rows starting at `row` that do see
// it. This is rare, so it need not be fast.
template <class T, int kChunks, int kBlocks16, int kColumns8, class Mask>
DLM_DEVICE void add_not_finite(Sums<kBlocks16, kColumns8>& sums, int row, const Sight<Mask>& sight,
                               int keys, uint32_t v_tile, int first_chunk) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int key = 0; key < keys; ++key) {
    bool visible[kBlocks16][2];
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = row + i * 16 + half * 8 + lane / 4;
        visible[i][half] = (sight.of(own) >> key & 1) && sight.in_order(own, key);
      }
    }
#pragma unroll
    for (int d = 0; d < kColumns8; ++d) {
      const uint4 eight = ptx::ld_shared_16(v_tile + chunk_offset<kChunks>(key, first_chunk + d));
      const uint32_t left = lane & 1 ? eight.y : eight.x, right = lane & 1 ? eight.w : eight.z;
      const uint32_t pair = lane & 2 ? right : left;
      const uint32_t wrong = not_finite<T>(pair);
      if (wrong == 0) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(wrong >> (e * 16 + 15) & 1)) continue;
        const float element = to_float(T{uint16_t(pair >> e * 16)});
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
          if (visible[i][0]) sums[i][d][e] += element;
          if (visible[i][1]) sums[i][d][e + 2] += element;
        }
      }
    }
  }
}

// --- results -----------------------------------------------------------------------------------

// Writes results into the tile of queries, which is no longer needed: 8 kColumns8 columns starting
// at chunk `first_chunk`.
template <class T, int kChunks, int kBlocks16, int kColumns8>
DLM_DEVICE void stage_results(unsigned char* tile, int row, int first_chunk,
                              const Sums<kBlocks16, kColumns8>& sums,
                              const Norm (&norm)[kBlocks16][2]) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + i * 16 + half * 8 + lane / 4;
      const Norm n = norm[i][half];
#pragma unroll
      for (int d = 0; d < kColumns8; ++d) {
        const float left = normalised(sums[i][d][half * 2], n);
        const float right = normalised(sums[i][d][half * 2 + 1], n);
        unsigned char* to = tile + chunk_offset<kChunks>(own, first_chunk + d) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = pack<T>(left, right);
      }
    }
  }
}

// Stores kColumns8 chunks of staged rows, 16 bytes per thread; this is thread number `thread` of
// `threads`.
template <class T, int kChunks, int kColumns8>
DLM_DEVICE void store_staged(const AttendParams& p, const Place& place, uint32_t tile, int row,
                             int rows, int first_chunk, int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < rows * kColumns8; i += threads) {
    const int own = row + i / kColumns8, chunk = first_chunk + i % kColumns8;
    if (place.first_row + own >= p.rows || chunk * 8 >= int(p.op.D)) continue;
    ptx::st_global_16(static_cast<T*>(p.op.out) + out_row(p, place, own) * p.op.D + chunk * 8,
                      ptx::ld_shared_16(tile + chunk_offset<kChunks>(own, chunk)));
  }
}

}  // namespace dlm::cuda
