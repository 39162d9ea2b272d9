// SPDX-License-Identifier: Apache-2.0
// out = softmax(scale * q.k) . v for many rows: whole canvases, prompts. An online softmax (Milakov
// & Gimelshein, 2018) around two products on tensor cores (Dao, "FlashAttention-2", 2023).
//   block  a row tile of one KV head (rows: the group's query heads x Q) and all slots they see
//   warp   16 or 32 of its rows and all slots
// Flops: 4 D per slot and row, limited by the tensor cores. Reading their operands from shared
// memory is the next limit, which 32 rows per warp halve.
// Instructions: sm_80 (mma.sync, ldmatrix, cp.async).
#pragma once
#include "cuda/block_attention_mma.cuh"

namespace dlm::cuda {

// Notes about a warp's rows, in shared memory, to save registers.
struct WarpNotes {
  Bounds bounds;
  Interval wrong;  // slots of the masked tiles of v that hold NaN or infinities
};

// Every configuration keeps a block within 99 KiB of shared memory (sm_86, sm_89, sm_120). The sums
// of a warp, rows x D floats, take at most half of its registers, and its logits, rows x keys, a
// few more.
template <int kD>
struct WideTiling {
  static constexpr int kBlocks16 = kD == 256 ? 1 : 2;  // blocks of 16 rows per warp
  static constexpr int kWarpRows = 16 * kBlocks16, kRows = kWarpRows * (kAttendThreads / 32);
  static constexpr int kKeys = 32, kStages = kD == 256 ? 2 : 3;

  static constexpr uint32_t kQueryBytes = kRows * kD * 2;
  static constexpr uint32_t kTileBytes = kKeys * kD * 2;
  static constexpr uint32_t kArenaBytes = kQueryBytes + kStages * 2 * kTileBytes;
  static constexpr SmemSize kSmem = SmemSize{}
                                        .take<unsigned char>(kArenaBytes)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<WarpNotes>(kAttendThreads / 32);
  static_assert(kSmem.bytes <= 99 * 1024);
};

template <class T, int kD>
class AttendWide {
  using Tiling = WideTiling<kD>;
  using Tile = KeyTile<Tiling::kKeys>;
  using Mask = typename Tile::Mask;
  static constexpr int kBlocks16 = Tiling::kBlocks16, kWarpRows = Tiling::kWarpRows;
  static constexpr int kKeys = Tiling::kKeys, kChunks = kD / 8;
  using Logits = Scores<kBlocks16, kKeys / 8>;

 public:
  DLM_DEVICE explicit AttendWide(const AttendParams& p)
      : p_(p),
        place_(place_of_block<Tiling::kRows>(p)),
        lane_(int(threadIdx.x) % 32),
        row_(int(threadIdx.x) / 32 * kWarpRows) {}

  DLM_DEVICE void run() {
    SmemCarver smem;
    arena_ = smem.take<unsigned char>(Tiling::kArenaBytes);
    queries_ = ptx::smem_address(arena_);
    limits_.take(smem, Tiling::kRows);

    load_queries<T, kD, Tiling::kRows>(queries_, p_, place_);
    limits_.fill(p_, place_, Tiling::kRows);
    __syncthreads();
    notes_ = smem.take<WarpNotes>(kAttendThreads / 32) + threadIdx.x / 32;
    const Bounds bounds = bounds_of(limits_, row_, kWarpRows);
    if (lane_ == 0) *notes_ = {bounds, {INT_MAX, 0}};
    __syncwarp();
    KeyTiles<kKeys> tiles(p_.op, place_.b);
    tiles.confine(bounds_of(limits_, 0, Tiling::kRows), 0, INT_MAX);
    for_each_key_tile<T, kD, kD, kKeys, Tiling::kStages>(
        p_, place_, tiles, queries_ + Tiling::kQueryBytes,
        [&](const Tile& tile, uint32_t k, uint32_t v) { attend(tile, k, v); });
    store();
  }

 private:
  DLM_DEVICE int row_of(int block16, int half) const {
    return row_ + block16 * 16 + half * 8 + lane_ / 4;
  }

  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    const Bounds bounds = notes_->bounds;
    if (tile.slot >= bounds.last || tile.slot + kKeys <= bounds.first) return;
    // Whether rows see different slots, or slots must be left out.
    if (tile.bits != Tile::kAll || tile.slot < bounds.all_first ||
        tile.slot + kKeys > bounds.all_last || p_.op.k_order || p_.hidden) {
      attend<true>(tile, k_tile, v_tile);
    } else {
      attend<false>(tile, k_tile, v_tile);
    }
  }

  template <bool masked>
  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    Logits s = {};
    multiply_tiles<T, kD>(s, queries_, row_, k_tile, 0);
    if constexpr (masked) {
      mask_logits(s, row_, Sight<Mask>{p_, limits_, place_.b, tile.slot, tile.bits});
    }
    online_softmax(s);
    uint32_t poison = 0;
    const uint32_t v_row = row_start<kChunks>(v_tile, lane_ % 16, lane_ / 16);
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t weights[kBlocks16][4];
#pragma unroll
      for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* w = s[i][j * 2 + e / 2] + e % 2 * 2;
          weights[i][e] = pack<T>(w[0], w[1]);
        }
      }
      multiply_values<T, masked>(sums_, weights, v_row + uint32_t(j * 16 * kD * 2), poison);
    }
    if (masked && __any_sync(~0u, poison)) {
      __syncwarp();
      Interval& wrong = notes_->wrong;
      if (lane_ == 0) wrong = {min(wrong.low, tile.slot), max(wrong.high, tile.slot + kKeys)};
      __syncwarp();
    }
  }

  // Turns logits into weights; sums and norms are scaled down where a maximum grows. Lanes keep the
  // sums of their own columns until the end.
  DLM_DEVICE void online_softmax(Logits& s) {
    float shrink[kBlocks16][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Norm& n = norm_[i][half];
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          largest = fmaxf(largest, fmaxf(s[i][j][half * 2], s[i][j][half * 2 + 1]));
        }
        const float maximum = fmaxf(n.maximum, max_of_row(largest) * p_.scale);
        const float base = base_of(maximum);
        shrink[i][half] = ptx::exp2_approx(n.maximum - base);
        grown |= shrink[i][half] != 1.0f;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[i][j][e] = ptx::exp2_approx(fmaf(s[i][j][e], p_.scale, -base));
            sum += s[i][j][e];
          }
        }
        n = {maximum, fmaf(n.sum, shrink[i][half], sum)};
      }
    }
    if (__any_sync(~0u, grown)) shrink_sums(sums_, shrink);
  }

  // A warp stages its rows in the place of its queries.
  DLM_DEVICE void store() {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        Norm& n = norm_[i][half];
        n.sum = sum_of_row(n.sum);
        if (limits_.low[row] >= limits_.high[row]) n = Norm{};
        if (lane_ % 4 == 0 && place_.first_row + row < p_.rows) {
          p_.op.lse[out_row(p_, place_, row)] = log_sum_exp(n);
        }
      }
    }
    stage_results<T, kChunks>(arena_, row_, 0, sums_, norm_);
    __syncwarp();
    if (notes_->wrong.low < notes_->wrong.high) add_wrong();
    store_staged<T, kChunks, kChunks>(p_, place_, queries_, row_, kWarpRows, 0, lane_, 32);
  }

  // Adds what multiply_values left out for the rows that do see it, reading from memory: NaN and
  // infinities are rare, and handling them together with the sums would spill registers.
  DLM_DEVICE void add_wrong() {
    const BlockAttentionParams& op = p_.op;
    const T* v = static_cast<const T*>(op.v_cache) + op.cache_row(place_.b) * op.v_cache_stride[0] +
                 place_.g * op.v_cache_stride[2];
#pragma unroll 1
    for (int row = row_; row < row_ + kWarpRows; ++row) {
      const int32_t low = max(notes_->wrong.low, limits_.low[row]);
      const int32_t high = min(notes_->wrong.high, limits_.high[row]);
#pragma unroll 1
      for (int32_t slot = low; slot < high; ++slot) {
        const Sight<uint32_t> sight{p_, limits_, place_.b, slot, 1};
        if (!in_a_range(slot) || !sight.of(row) || !sight.in_order(row, 0)) continue;
#pragma unroll 1
        for (int column = lane_; column < int(op.D); column += 32) {
          const float x = to_float(v[slot * op.v_cache_stride[1] + column]);
          if (x - x == 0.0f) continue;
          T* sum =
              reinterpret_cast<T*>(arena_ + chunk_offset<kChunks>(row, column / 8)) + column % 8;
          *sum = from_float<T>(to_float(*sum) + x);
        }
      }
    }
    __syncwarp();
  }
  DLM_DEVICE bool in_a_range(int32_t slot) const {
    const BlockAttentionParams& op = p_.op;
    if (!op.kv_range) return true;
    const int32_t* range = op.kv_range + place_.b * op.N * 2;
    bool in = false;
    for (int64_t n = 0; n < op.N; ++n) in |= slot >= range[2 * n] && slot < range[2 * n + 1];
    return in;
  }

  const AttendParams& p_;
  const Place place_;
  const int lane_, row_;            // the warp's first row
  unsigned char* arena_ = nullptr;  // queries, then key tiles
  uint32_t queries_ = 0;
  RowLimits limits_;
  WarpNotes* notes_ = nullptr;
  Sums<kBlocks16, kD / 8> sums_ = {};
  Norm norm_[kBlocks16][2];
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttendThreads, 2)
    attend_wide_kernel(const __grid_constant__ AttendParams p) {
  AttendWide<T, kD>(p).run();
}

}  // namespace dlm::cuda
