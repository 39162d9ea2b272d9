// SPDX-License-Identifier: Apache-2.0
// out = softmax(scale * q.k) . v in fp32 throughout, for models that run in fp32.
//   block   32 rows of one KV head (rows: the group's query heads x Q), 16 for heads of 512; and a
//           split of 256 slots or, if the batch fills the device, all splits one after the other
//   thread  2 rows, or 1; every eighth slot of a key tile, every eighth group of 4 columns of the
//           sums: 8 neighboring threads share their rows and exchange weights by shuffles
// Flops: 4 D per slot and row. Bytes: 8 D per slot and 32 rows, 16 flops per byte. With 2 x 4
// products per thread the reads from shared memory are the limit, at about a third of the FMA rate.
// Instructions: sm_80 (cp.async).
#pragma once
#include "cuda/block_attention_parts.cuh"

namespace dlm::cuda {

template <int kD>
struct Fp32Tiling {
  static constexpr int kOwnRows = kD == 512 ? 1 : 2, kRows = kOwnRows * kAttendThreads / 8;
  static constexpr int kKeys = kD == 512 ? 8 : kD == 256 ? 16 : 32, kStages = 2;
  static constexpr uint32_t kQueryBytes = kRows * kD * 4, kTileBytes = kKeys * kD * 4;
  static constexpr uint32_t kArenaBytes = kQueryBytes + kStages * 2 * kTileBytes;
  static constexpr SmemSize kSmem = SmemSize{}
                                        .take<unsigned char>(kArenaBytes)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<uint32_t>(1);
  static_assert(kSmem.bytes <= 99 * 1024);
};

template <int kD, AttendForm form>
struct AttendFp32 {
  using Tiling = Fp32Tiling<kD>;
  using Tile = KeyTile<Tiling::kKeys>;
  static constexpr int kRows = Tiling::kRows, kOwnRows = Tiling::kOwnRows;
  static constexpr int kChunks = kD / 4, kOwnKeys = Tiling::kKeys / 8, kOwnChunks = kChunks / 8;

  const AttendParams& p;
  const Place place;
  const int row0, share;  // first row; slots and column groups share, share + 8, ..
  RowLimits limits;
  uint32_t queries = 0;
  float sums[kOwnRows][kOwnChunks][4];
  Norm norm[kOwnRows], total[kOwnRows];

  DLM_DEVICE explicit AttendFp32(const AttendParams& params)
      : p(params),
        place(place_of_block<kRows>(params)),
        row0(int(threadIdx.x) / 8 * kOwnRows),
        share(int(threadIdx.x) % 8) {}

  DLM_DEVICE void run() {
    SmemCarver smem;
    queries = ptx::smem_address(smem.take<unsigned char>(Tiling::kArenaBytes));
    limits.take(smem, kRows);
    uint32_t* flag = smem.take<uint32_t>(1);
    load_queries<float, kD, kRows>(queries, p, place);
    limits.fill(p, place, kRows);
    __syncthreads();
    const Bounds bounds = bounds_of(limits, 0, kRows);
    KeyTiles<Tiling::kKeys> tiles(p.op, place.b);
#pragma unroll 1
    for (int32_t split = place.first_split; split < place.last_split; ++split) {
      tiles.confine(bounds, split, kSplitSlots);
      start_split();
      for_each_key_tile<float, kD, kD, Tiling::kKeys, Tiling::kStages>(
          p, place, tiles, queries + Tiling::kQueryBytes,
          [&](const Tile& tile, uint32_t k, uint32_t v) { attend(tile, k, v); });
      end_split(split);
    }
    if (p.spread && is_last_to_arrive(p, place, 1, flag)) fold_splits<float>(p, place, kRows);
  }

  DLM_DEVICE void start_split() {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      norm[r] = Norm{};
#pragma unroll
      for (int c = 0; c < kOwnChunks; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[r][c][e] = 0.0f;
      }
    }
  }

  DLM_DEVICE bool sees(int row, const Tile& tile, int key) const {
    const int32_t slot = tile.slot + key;
    return (tile.bits >> key & 1) && slot >= limits.low[row] && slot < limits.high[row] &&
           is_in_order(p.op, place.b, limits.query[row], slot) &&
           !(p.hidden && (hidden_slots<uint32_t>(p, place.b, limits.query[row], slot) & 1));
  }

  DLM_DEVICE float logit(float dot) const {
    return form == AttendForm::kGeneral ? general_logit(p.op, dot) : dot * p.scale;
  }

  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    float s[kOwnRows][kOwnKeys] = {};
#pragma unroll 4
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float4 q[kOwnRows];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        q[r] = as_floats(ptx::ld_shared_16(queries + chunk_offset<kChunks>(row0 + r, chunk)));
      }
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        const float4 k =
            as_floats(ptx::ld_shared_16(k_tile + chunk_offset<kChunks>(share + j * 8, chunk)));
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          s[r][j] = fmaf(q[r].x, k.x, s[r][j]);
          s[r][j] = fmaf(q[r].y, k.y, s[r][j]);
          s[r][j] = fmaf(q[r].z, k.z, s[r][j]);
          s[r][j] = fmaf(q[r].w, k.w, s[r][j]);
        }
      }
    }

    uint32_t seen[kOwnRows] = {};  // bit j: own slot j
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      float maximum = norm[r].maximum;
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        const bool visible = sees(row0 + r, tile, share + j * 8);
        const float scaled = logit(s[r][j]);
        s[r][j] = visible ? scaled : -INFINITY;
        seen[r] |= uint32_t(visible) << j;
        maximum = fmaxf(maximum, s[r][j]);
      }
#pragma unroll
      for (int other = 1; other < 8; other *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, other));
      }
      const float base = base_of(maximum);
      const float shrink = exp2f(norm[r].maximum - base);
      norm[r].maximum = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        s[r][j] = exp2f(s[r][j] - base);
        sum += s[r][j];
      }
      norm[r].sum = fmaf(norm[r].sum, shrink, sum);
#pragma unroll
      for (int c = 0; c < kOwnChunks; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[r][c][e] *= shrink;
      }
    }

#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
#pragma unroll 2
      for (int other = 0; other < 8; ++other) {
        float weight[kOwnRows];
        bool visible[kOwnRows];
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          weight[r] = __shfl_sync(~0u, s[r][j], other, 8);
          visible[r] = __shfl_sync(~0u, seen[r], other, 8) >> j & 1;
        }
#pragma unroll
        for (int c = 0; c < kOwnChunks; ++c) {
          const float4 v = as_floats(
              ptx::ld_shared_16(v_tile + chunk_offset<kChunks>(other + j * 8, share + c * 8)));
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
            // A row must not even multiply by zero what it does not see.
            if (!visible[r]) continue;
            sums[r][c][0] = fmaf(weight[r], v.x, sums[r][c][0]);
            sums[r][c][1] = fmaf(weight[r], v.y, sums[r][c][1]);
            sums[r][c][2] = fmaf(weight[r], v.z, sums[r][c][2]);
            sums[r][c][3] = fmaf(weight[r], v.w, sums[r][c][3]);
          }
        }
      }
    }
  }

  // Stores the sums of the split or, if `total`, of all splits.
  DLM_DEVICE void end_split(int32_t split) {
    const bool last = split + 1 == place.last_split;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      Norm n = norm[r];
#pragma unroll
      for (int other = 1; other < 8; other *= 2) {
        n.sum += __shfl_xor_sync(~0u, n.sum, other);
      }
      if (place.first_row + row0 + r >= p.rows) continue;
      const int64_t row = out_row(p, place, row0 + r), part = row * p.splits + split;
      if (p.spread && share == 0) p.partial_norm[part] = make_float2(n.maximum, n.sum);
      const bool before = total[r].sum != 0.0f, adds = n.sum != 0.0f;
      Fold f{1.0f, 0.0f};
      if (!p.spread && adds) f = fold(total[r], n);
      if (!p.spread && last && share == 0) p.op.lse[row] = log_sum_exp(total[r]);
#pragma unroll
      for (int c = 0; c < kOwnChunks; ++c) {
        const int column = (share + c * 8) * 4;
        if (column >= int(p.op.D)) continue;
        const float (&sum)[4] = sums[r][c];
        if (p.spread) {
          ptx::st_global_16(p.partial + part * p.op.D + column,
                            as_words(sum[0], sum[1], sum[2], sum[3]));
          continue;
        }
        float* memory = p.partial + row * p.op.D + column;
        float4 x = before ? as_floats(ptx::ld_global_16(memory)) : float4{0, 0, 0, 0};
        if (adds) x = {f(x.x, sum[0]), f(x.y, sum[1]), f(x.z, sum[2]), f(x.w, sum[3])};
        if (last) {
          store_out<float>(p, row, column, x, total[r]);
        } else if (adds) {
          ptx::st_global_16(memory, as_words(x.x, x.y, x.z, x.w));
        }
      }
    }
  }
};

// As many blocks as a multiprocessor's shared memory can hold; without this bound, ptxas spills to
// fit more.
template <int kD, AttendForm form>
__global__ void __launch_bounds__(kAttendThreads, kD >= 256 ? 1 : 2)
    attend_fp32_kernel(const __grid_constant__ AttendParams p) {
  AttendFp32<kD, form>(p).run();
}

}  // namespace dlm::cuda
