// SPDX-License-Identifier: Apache-2.0
// out = softmax(scale * q.k) . v for few rows, such as a block of 4 to 32 queries during decoding.
//   block  32 rows of one KV head (rows: the group's query heads x Q) and a split of 256 slots or,
//          if the batch fills the device, all splits one after the other; for heads of 512, two
//          blocks share the columns of v, and each computes all weights
//   warp   for every key tile, the logits of a share of its slots; then, when all warps have stored
//          their weights in shared memory, the sums of a quarter of the columns
// Bytes: 4 D per slot and 32 rows, 32 flops per byte: limited by memory. Sharing the columns keeps
// the sums of a warp at 8 D / 32 registers per lane, so that heads of up to 512 fit, and warps need
// not be merged at the end; it costs two more barriers per tile. Instructions: sm_80 (mma.sync,
// ldmatrix, cp.async).
#pragma once
#include "cuda/block_attention_mma.cuh"

namespace dlm::cuda {

constexpr int kNarrowRows = 32;

// Every configuration keeps a block within 99 KiB of shared memory (sm_86, sm_89, sm_120).
template <int kD>
struct NarrowTiling {
  static constexpr int kWarps = kAttendThreads / 32;
  static constexpr int kKeys = kD <= 128 ? 64 : kD == 256 ? 32 : 16;
  static constexpr int kStages = kD == 64 ? 3 : 2;
  // Warps that share the logits of a tile: groups of rows x groups of slots.
  static constexpr int kRowGroups = kD <= 128 ? 1 : 2, kKeyGroups = kWarps / kRowGroups;
  static constexpr int kOwnKeys = kKeys / kKeyGroups;
  static constexpr int kParts = kD == 512 ? 2 : 1, kColumns = kD / kParts;  // of v, per block
  static constexpr int kOwnColumns = kColumns / kWarps;
  // A row of weights, padded so that eight rows are in different banks.
  static constexpr uint32_t kWeightRowBytes = kKeys * 2 + 16;

  static constexpr uint32_t kQueryBytes = kNarrowRows * kD * 2;
  static constexpr uint32_t kArenaBytes = kQueryBytes + kStages * kKeys * (kD + kColumns) * 2;
  static constexpr uint32_t kWeightsBytes = kNarrowRows * kWeightRowBytes;
  static constexpr uint32_t kGroupRows = kKeyGroups * kNarrowRows;
  static constexpr SmemSize kSmem = SmemSize{}
                                        .take<unsigned char>(kArenaBytes)
                                        .take<unsigned char>(kWeightsBytes)
                                        .take<float>(kGroupRows)
                                        .take<int32_t>(kNarrowRows)
                                        .take<int32_t>(kNarrowRows)
                                        .take<int32_t>(kNarrowRows);
  static_assert(kSmem.bytes <= 99 * 1024);
};

template <class T, int kD, AttendForm form>
class AttendNarrow {
  using Tiling = NarrowTiling<kD>;
  using Tile = KeyTile<Tiling::kKeys>;
  static constexpr int kBlocks16 = kNarrowRows / 16;             // of the sums
  static constexpr int kOwn16 = kBlocks16 / Tiling::kRowGroups;  // of the logits
  static constexpr int kTiles8 = Tiling::kOwnKeys / 8, kColumns8 = Tiling::kOwnColumns / 8;
  static constexpr int kChunks = kD / 8, kValueChunks = Tiling::kColumns / 8;

 public:
  DLM_DEVICE explicit AttendNarrow(const AttendParams& p)
      : p_(p),
        place_(place_of_block<kNarrowRows, Tiling::kParts>(p)),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32),
        own16_(warp_ / Tiling::kKeyGroups * kOwn16),
        key_group_(warp_ % Tiling::kKeyGroups) {}

  DLM_DEVICE void run() {
    SmemCarver smem;
    arena_ = smem.take<unsigned char>(Tiling::kArenaBytes);
    queries_ = ptx::smem_address(arena_);
    weights_ = smem.take<unsigned char>(Tiling::kWeightsBytes);
    of_groups_ = smem.take<float>(Tiling::kGroupRows);
    limits_.take(smem, kNarrowRows);

    load_queries<T, kD, kNarrowRows>(queries_, p_, place_);
    limits_.fill(p_, place_, kNarrowRows);
    __syncthreads();
    bounds_ = bounds_of(limits_, 0, kNarrowRows);
    KeyTiles<Tiling::kKeys> tiles(p_.op, place_.b);
#pragma unroll 1
    for (int32_t split = place_.first_split; split < place_.last_split; ++split) {
      tiles.confine(bounds_, split, kSplitSlots);
      start_split();
      for_each_key_tile<T, kD, Tiling::kColumns, Tiling::kKeys, Tiling::kStages>(
          p_, place_, tiles, queries_ + Tiling::kQueryBytes,
          [&](const Tile& tile, uint32_t k, uint32_t v) { attend(tile, k, v); });
      end_split(split);
    }
  }

 private:
  DLM_DEVICE int row_of(int block16, int half) const { return block16 * 16 + half * 8 + lane_ / 4; }

  DLM_DEVICE void start_split() {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum_[i][half] = -INFINITY;
#pragma unroll
      for (int d = 0; d < kColumns8; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][d][e] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn16; ++i) own_sum_[i][0] = own_sum_[i][1] = 0.0f;
  }

  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    // Whether rows see different slots, or slots must be left out.
    if (tile.bits != Tile::kAll || tile.slot < bounds_.all_first ||
        tile.slot + Tiling::kKeys > bounds_.all_last || p_.op.k_order || p_.hidden) {
      attend<true>(tile, k_tile, v_tile);
    } else {
      attend<false>(tile, k_tile, v_tile);
    }
  }

  template <bool masked>
  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    using Mask = typename Tile::Mask;
    const int key = key_group_ * Tiling::kOwnKeys, row = own16_ * 16;
    Scores<kOwn16, kTiles8> s = {};
    multiply_tiles<T, kD>(s, queries_, row, k_tile, key);
    if constexpr (form == AttendForm::kGeneral) {
#pragma unroll
      for (int i = 0; i < kOwn16; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j][e] = general_logit(p_.op, s[i][j][e]);
        }
      }
    }
    if constexpr (masked) {
      const Sight<Mask> sight{p_, limits_, place_.b, tile.slot + key, Mask(tile.bits >> key)};
      mask_logits(s, row, sight);
    }
    leave_maxima(s);
    __syncthreads();
    leave_weights(s);
    __syncthreads();
    uint32_t poison = 0;
    add_values<masked>(v_tile, poison);
    if (masked && __any_sync(~0u, poison)) {
      const Sight<Mask> sight{p_, limits_, place_.b, tile.slot, tile.bits};
      add_not_finite<T, kValueChunks>(sums_, 0, sight, Tiling::kKeys, v_tile, warp_ * kColumns8);
    }
  }

  // A weight is 2^(s * scale - base).
  DLM_DEVICE float scale() const { return form == AttendForm::kGeneral ? 1.0f : p_.scale; }

  // Stores the largest logits of this warp's slots.
  DLM_DEVICE void leave_maxima(const Scores<kOwn16, kTiles8>& s) const {
#pragma unroll
    for (int i = 0; i < kOwn16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
          largest = fmaxf(largest, fmaxf(s[i][j][half * 2], s[i][j][half * 2 + 1]));
        }
        largest = max_of_row(largest) * scale();
        if (lane_ % 4 == 0) {
          of_groups_[key_group_ * kNarrowRows + row_of(own16_ + i, half)] = largest;
        }
      }
    }
  }

  // Scales the sums down where a maximum grows, and turns logits into weights, in shared memory.
  DLM_DEVICE void leave_weights(Scores<kOwn16, kTiles8>& s) {
    float shrink[kBlocks16][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = maximum_[i][half];
#pragma unroll
        for (int group = 0; group < Tiling::kKeyGroups; ++group) {
          maximum = fmaxf(maximum, of_groups_[group * kNarrowRows + row_of(i, half)]);
        }
        shrink[i][half] = ptx::exp2_approx(maximum_[i][half] - base_of(maximum));
        grown |= shrink[i][half] != 1.0f;
        maximum_[i][half] = maximum;
      }
    }
    if (__any_sync(~0u, grown)) shrink_sums(sums_, shrink);
#pragma unroll
    for (int i = 0; i < kOwn16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = base_of(of_own(maximum_, i, half));
        unsigned char* to = weights_ +
                            uint32_t(row_of(own16_ + i, half)) * Tiling::kWeightRowBytes +
                            uint32_t(key_group_ * Tiling::kOwnKeys + lane_ % 4 * 2) * 2;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTiles8; ++j) {
          const float left = ptx::exp2_approx(fmaf(s[i][j][half * 2], scale(), -base));
          const float right = ptx::exp2_approx(fmaf(s[i][j][half * 2 + 1], scale(), -base));
          sum += left + right;
          *reinterpret_cast<uint32_t*>(to + j * 16) = pack<T>(left, right);
        }
        own_sum_[i][half] = fmaf(own_sum_[i][half], of_own(shrink, i, half), sum);
      }
    }
  }
  // Returns the values of row block i of this warp's logits; a non-constant index would use local
  // memory.
  DLM_DEVICE float of_own(const float (&x)[kBlocks16][2], int i, int half) const {
    if constexpr (Tiling::kRowGroups == 1) return x[i][half];
    return own16_ == 0 ? x[0][half] : x[1][half];
  }

  template <bool masked>
  DLM_DEVICE void add_values(uint32_t v_tile, uint32_t& poison) {
    const uint32_t first = uint32_t(warp_ * kColumns8);  // first chunk of this warp's columns
    const uint32_t v_row =
        chunk_from(row_start<kValueChunks>(v_tile, lane_ % 16, lane_ / 16), int(first));
    const uint32_t w_row = ptx::smem_address(weights_) +
                           uint32_t(lane_ % 16) * Tiling::kWeightRowBytes +
                           uint32_t(lane_ / 16 * 16);
#pragma unroll
    for (int j = 0; j < Tiling::kKeys / 16; ++j) {
      uint32_t weights[kBlocks16][4];
#pragma unroll
      for (int i = 0; i < kBlocks16; ++i) {
        ptx::ldmatrix(weights[i], w_row + uint32_t(i * 16) * Tiling::kWeightRowBytes + j * 32);
      }
      multiply_values<T, masked>(sums_, weights, v_row + uint32_t(j * 16 * Tiling::kColumns * 2),
                                 poison);
    }
  }

  // --- end of a split ---

  DLM_DEVICE void end_split(int32_t split) {
    Norm norm[kBlocks16][2];
    gather_norms(norm);
    if (p_.spread) {
      leave(norm, split);
      uint32_t* flag = reinterpret_cast<uint32_t*>(of_groups_);
      if (is_last_to_arrive(p_, place_, Tiling::kParts, flag))
        fold_splits<T>(p_, place_, kNarrowRows);
      return;
    }
    const bool last = split + 1 == place_.last_split;
    if (p_.splits > 1) fold_in(norm, last);
    if (last) store(norm);
  }

  // Adds up the sums of the weights of all warps.
  DLM_DEVICE void gather_norms(Norm (&norm)[kBlocks16][2]) const {
#pragma unroll
    for (int i = 0; i < kOwn16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_of_row(own_sum_[i][half]);
        if (lane_ % 4 == 0) {
          of_groups_[key_group_ * kNarrowRows + row_of(own16_ + i, half)] = sum;
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        norm[i][half].maximum = maximum_[i][half];
        // Padded rows have seen something else, or nothing.
        if (limits_.low[row] >= limits_.high[row]) continue;
#pragma unroll
        for (int group = 0; group < Tiling::kKeyGroups; ++group) {
          norm[i][half].sum += of_groups_[group * kNarrowRows + row];
        }
      }
    }
    __syncthreads();
  }

  // The first column of this warp.
  DLM_DEVICE int first_column() const {
    return place_.column_part * Tiling::kColumns + warp_ * Tiling::kOwnColumns;
  }
  // Whether this is the one warp (of all warps and blocks that have a row's norm) that writes it.
  DLM_DEVICE bool writes_norms() const {
    return warp_ == 0 && lane_ % 4 == 0 && place_.column_part == 0;
  }

  // Calls each(column, its sum, the next column's sum).
  template <class Each>
  DLM_DEVICE void each_pair(int i, int half, const Each& each) {
#pragma unroll
    for (int d = 0; d < kColumns8; ++d) {
      const int column = first_column() + d * 8 + lane_ % 4 * 2;
      if (column < int(p_.op.D)) each(column, sums_[i][d][half * 2], sums_[i][d][half * 2 + 1]);
    }
  }

  DLM_DEVICE void leave(const Norm (&norm)[kBlocks16][2], int32_t split) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        if (place_.first_row + row >= p_.rows) continue;
        const int64_t at = out_row(p_, place_, row) * p_.splits + split;
        const Norm n = norm[i][half];
        if (writes_norms()) p_.partial_norm[at] = make_float2(n.maximum, n.sum);
        each_pair(i, half, [&](int column, float left, float right) {
          *reinterpret_cast<float2*>(p_.partial + at * p_.op.D + column) = make_float2(left, right);
        });
      }
    }
  }

  // Merges the split with the previous ones, whose sums this thread has stored in memory; for the
  // last split, the merged sums replace those of the split.
  DLM_DEVICE void fold_in(Norm (&norm)[kBlocks16][2], bool last) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        Norm& total = total_[i][half];
        const bool before = total.sum != 0.0f, adds = norm[i][half].sum != 0.0f;
        Fold f{1.0f, 0.0f};
        if (adds) f = fold(total, norm[i][half]);
        norm[i][half] = total;
        if (place_.first_row + row >= p_.rows || !(adds || last)) continue;
        float* to = p_.partial + out_row(p_, place_, row) * p_.op.D;
        each_pair(i, half, [&](int column, float& left, float& right) {
          float2& memory = *reinterpret_cast<float2*>(to + column);
          const float2 so_far = before ? memory : make_float2(0.0f, 0.0f);
          left = adds ? f(so_far.x, left) : so_far.x;
          right = adds ? f(so_far.y, right) : so_far.y;
          if (!last) memory = make_float2(left, right);
        });
      }
    }
  }

  DLM_DEVICE void store(const Norm (&norm)[kBlocks16][2]) {
    stage_results<T, kChunks>(arena_, 0, first_column() / 8, sums_, norm);
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        if (writes_norms() && place_.first_row + row < p_.rows) {
          p_.op.lse[out_row(p_, place_, row)] = log_sum_exp(norm[i][half]);
        }
      }
    }
    __syncthreads();
    store_staged<T, kChunks, kValueChunks>(p_, place_, queries_, 0, kNarrowRows,
                                           place_.column_part * kValueChunks, int(threadIdx.x),
                                           kAttendThreads);
  }

  const AttendParams& p_;
  const Place place_;
  const int lane_, warp_, own16_, key_group_;
  unsigned char *arena_ = nullptr, *weights_ = nullptr;  // queries and key tiles; weights
  uint32_t queries_ = 0;
  float* of_groups_ = nullptr;  // per group of slots and row: maximum, then sum of weights
  RowLimits limits_;
  Bounds bounds_{};
  Sums<kBlocks16, kColumns8> sums_;
  float maximum_[kBlocks16][2], own_sum_[kOwn16][2];
  Norm total_[kBlocks16][2];
};

template <class T, int kD, AttendForm form>
__global__ void __launch_bounds__(kAttendThreads, 2)
    attend_narrow_kernel(const __grid_constant__ AttendParams p) {
  AttendNarrow<T, kD, form>(p).run();
}

}  // namespace dlm::cuda
