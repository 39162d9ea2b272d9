// SPDX-License-Identifier: Apache-2.0
// out = softmax(scale * q.k) . v over the slots a row sees, by an online softmax (Milakov &
// Gimelshein, 2018) around two products on tensor cores (Dao, "FlashAttention-2", 2023).
//   block   a row tile of one KV head (rows: the group's query heads x Q) and one split of its
//   slots warp    16 or 32 rows and, of every key tile, all slots (wide) or a share of them
//   (narrow): few
//           rows would leave warps idle, or have each read the same K and V from shared memory
//   lane    fragments of mma.m16n8k16: rows lane/4 and lane/4 + 8, columns 2 (lane%4) and the next
// Bytes: 4 D a slot and row tile; flops: 4 D a slot and row. A narrow tile (32 flops a byte) is
// bound by memory; a wide one by the tensor cores, whose operand traffic from shared memory is the
// next limit: 32 rows a warp halve it.
// Instructions: sm_80 (mma.sync, ldmatrix, cp.async).
#pragma once
#include "cuda/block_attention_parts.cuh"

namespace dlm::cuda {

constexpr int kNarrowRows = 32;  // up to so many rows, a block is narrow; literal ones all are

// Every choice keeps a block within 99 KiB of shared memory (sm_86, sm_89, sm_120) and the sums of
// a warp, rows x D floats, within half of its registers. The ring of key tiles is later reused for
// the sums of all warps.
template <int kD, AttendForm form>
struct AttendTiling {
  static constexpr bool kWide = form == AttendForm::kWide;
  static constexpr int kBlocks16 = kD == 256 ? 1 : 2;  // blocks of 16 rows of a warp
  static constexpr int kRowWarps = kWide ? 4 : kD == 256 ? 2 : 1;
  static constexpr int kKeyWarps = kAttendThreads / 32 / kRowWarps;
  static constexpr int kWarpRows = 16 * kBlocks16, kRows = kWarpRows * kRowWarps;
  // Logits of a wide warp take rows x keys / 32 registers beside the sums.
  static constexpr int kKeys = kD == 64 ? 64 : kD == 256 || kWide ? 32 : 64;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kStages = kD == 64 || (kD == 128 && kWide) ? 3 : 2;

  static constexpr uint32_t kQueryBytes = kRows * kD * 2;
  static constexpr uint32_t kTileBytes = kKeys * kD * 2;
  static constexpr uint32_t kSumBytes = kKeyWarps * kRows * kD * 4;
  static constexpr uint32_t kArenaBytes = kQueryBytes + kStages * 2 * kTileBytes;
  static_assert(kSumBytes <= kArenaBytes && kWarpKeys % 16 == 0);
  static constexpr SmemSize kSmem = SmemSize{}
                                        .take<unsigned char>(kArenaBytes)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<int32_t>(kRows)
                                        .take<Norm>(kKeyWarps * kRows);
  static_assert(kSmem.bytes <= 99 * 1024);
};

template <class T>
DLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
}

// The exponent's lowest bit in both halves of a word; adding it to exponents of all ones overflows
// into the sign.
template <class T>
constexpr uint32_t kExponentUnits = std::is_same_v<T, BFloat16> ? 0x00800080u : 0x04000400u;
template <class T>
constexpr uint32_t kExponents = 0x80008000u - kExponentUnits<T>;

// Sign bits of the elements that are NaN or infinite.
template <class T>
DLM_DEVICE uint32_t not_finite(uint32_t pair) {
  return ((pair & kExponents<T>)+kExponentUnits<T>)&0x80008000u;
}

template <class T, int kD, AttendForm form, AttentionFault fault = AttentionFault::kNone>
struct Attend {
  using Tiling = AttendTiling<kD, form>;
  using Tile = KeyTile<Tiling::kKeys>;
  using Mask = typename Tile::Mask;
  static constexpr int kBlocks16 = Tiling::kBlocks16, kWarpRows = Tiling::kWarpRows;
  static constexpr int kWarpKeys = Tiling::kWarpKeys, kRows = Tiling::kRows;
  static constexpr int kChunks = kD / 8, kSumChunks = kD / 4;
  static constexpr uint32_t k16Rows = 16 * kD * 2;  // bytes, in a tile
  static constexpr Mask kAll = Mask(~Mask(0)) >> (int(sizeof(Mask)) * 8 - kWarpKeys);

  const AttendParams& p;
  const Place place;
  const int lane, warp_row, warp_key, key_warp;
  RowLimits limits;
  Bounds mine{};  // of this warp's rows
  uint32_t queries = 0;
  float sums[kBlocks16][kD / 8][4] = {};
  Norm norm[kBlocks16][2];

  DLM_DEVICE explicit Attend(const AttendParams& params)
      : p(params),
        place(place_of_block<kRows>(params)),
        lane(int(threadIdx.x) % 32),
        warp_row(int(threadIdx.x) / 32 % Tiling::kRowWarps * kWarpRows),
        warp_key(int(threadIdx.x) / 32 / Tiling::kRowWarps * kWarpKeys),
        key_warp(int(threadIdx.x) / 32 / Tiling::kRowWarps) {}

  DLM_DEVICE void run() {
    SmemCarver smem;
    unsigned char* arena = smem.take<unsigned char>(Tiling::kArenaBytes);
    limits.take(smem, kRows);
    Norm* norms = smem.take<Norm>(Tiling::kKeyWarps * kRows);
    queries = ptx::smem_address(arena);

    load_queries<T, kD, kRows>(queries, p, place);
    limits.fill(p, place, kRows);
    __syncthreads();
    mine = bounds_of(limits, warp_row, kWarpRows);
    KeyTiles<Tiling::kKeys> tiles(p.op, place.b);
    tiles.confine(bounds_of(limits, 0, kRows), place.split, p.split_length,
                  fault == AttentionFault::kSplitsOverlap ? Tiling::kKeys : 0);
    for_each_key_tile<T, kD, Tiling::kKeys, Tiling::kStages, fault>(
        p, place, tiles, queries + Tiling::kQueryBytes,
        [&](const Tile& tile, uint32_t at) { attend(tile, at, at + Tiling::kTileBytes); });
    share(reinterpret_cast<float*>(arena), norms);
    if (fault != AttentionFault::kMergedTooEarly) __syncthreads();
    finish(ptx::smem_address(arena), norms);
  }

  DLM_DEVICE int row_of(int block16, int half) const {
    return warp_row + block16 * 16 + half * 8 + lane / 4;
  }

  // This warp's share of a tile.
  DLM_DEVICE void attend(const Tile& tile, uint32_t k_tile, uint32_t v_tile) {
    const int32_t slot = tile.slot + warp_key;
    const Mask bits = tile.bits >> warp_key & kAll;
    if (bits == 0 || slot >= mine.last || slot + kWarpKeys <= mine.first) return;
    // Must rows be told apart, or slots left out?
    const bool masked = (bits != kAll || slot < mine.all_first ||
                         slot + kWarpKeys > mine.all_last || p.op.k_order) &&
                        fault != AttentionFault::kTailUnmasked;

    float s[kBlocks16][kWarpKeys / 8][4] = {};
    multiply_keys(s, k_tile);
    scale_logits(s);
    if (masked) mask_logits(s, slot, bits);
    online_softmax(s);
    const bool poisoned = multiply_values(s, v_tile, masked);
    if (masked && __any_sync(~0u, poisoned)) add_not_finite(slot, bits, v_tile);
  }

  // s = q k^T
  DLM_DEVICE void multiply_keys(float (&s)[kBlocks16][kWarpKeys / 8][4], uint32_t k_tile) const {
    const uint32_t q_row = row_start<kChunks>(queries, warp_row + lane % 16, lane / 16);
    const uint32_t k_row =
        row_start<kChunks>(k_tile, warp_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t q[kBlocks16][4];
#pragma unroll
      for (int i = 0; i < kBlocks16; ++i) {
        ptx::ldmatrix(q[i], chunk_from(q_row, d * 2) + i * k16Rows);
      }
#pragma unroll
      for (int j = 0; j < kWarpKeys / 16; ++j) {
        uint32_t k[4];
        ptx::ldmatrix(k, chunk_from(k_row, d * 2) + j * k16Rows);
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
          mma<T>(s[i][j * 2], q[i], k[0], k[1]);
          mma<T>(s[i][j * 2 + 1], q[i], k[2], k[3]);
        }
      }
    }
  }

  DLM_DEVICE void scale_logits(float (&s)[kBlocks16][kWarpKeys / 8][4]) const {
    const bool cap = p.cap > 0.0f;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (form == AttendForm::kLiteral) {
            s[i][j][e] = literal_logit(p, s[i][j][e]);
          } else {
            s[i][j][e] = cap ? capped(p, s[i][j][e]) : s[i][j][e] * p.scale;
          }
        }
      }
    }
  }

  // Which of the slots from `slot` on this row sees, order apart.
  DLM_DEVICE Mask seen_by(int row, int32_t slot, Mask bits) const {
    return bits & bits_between<Mask>(limits.low[row] - slot, limits.high[row] - slot);
  }
  DLM_DEVICE bool in_order(int row, int32_t slot) const {
    return !p.op.k_order || p.op.k_order[place.b * p.op.S + slot] <= limits.order[row];
  }

  DLM_DEVICE void mask_logits(float (&s)[kBlocks16][kWarpKeys / 8][4], int32_t slot,
                              Mask bits) const {
    const int column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        const Mask seen = seen_by(row, slot, bits) >> column;
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool visible =
                (seen >> (j * 8 + e) & 1) && in_order(row, slot + column + j * 8 + e);
            if (!visible) s[i][j][half * 2 + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Logits to weights; sums and norms shrink where a maximum grows. Lanes keep the sums of their
  // own columns until the end.
  DLM_DEVICE void online_softmax(float (&s)[kBlocks16][kWarpKeys / 8][4]) {
    float shrink[kBlocks16][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Norm& n = norm[i][half];
        float maximum = n.maximum;
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
          maximum = fmaxf(maximum, fmaxf(s[i][j][half * 2], s[i][j][half * 2 + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
        const float base = base_of(maximum);
        shrink[i][half] = ptx::exp2_approx(n.maximum - base);
        grown |= shrink[i][half] != 1.0f;
        n.maximum = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[i][j][e] = ptx::exp2_approx(s[i][j][e] - base);
            sum += s[i][j][e];
          }
        }
        n.sum = fmaf(n.sum, shrink[i][half], sum);
      }
    }
    if (!__any_sync(~0u, grown) || fault == AttentionFault::kNotRescaled) return;
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][d][e] *= shrink[i][e / 2];
      }
    }
  }

  // sums += weights v. In a masked tile a row must not even multiply by zero what it does not see:
  // NaN and infinities count as 0 there, and whether there were any is returned.
  DLM_DEVICE bool multiply_values(const float (&s)[kBlocks16][kWarpKeys / 8][4], uint32_t v_tile,
                                  bool masked) {
    const uint32_t v_row = row_start<kChunks>(v_tile, warp_key + lane % 16, lane / 16);
    uint32_t poison = 0;
#pragma unroll
    for (int j = 0; j < kWarpKeys / 16; ++j) {
      uint32_t weights[kBlocks16][4];
#pragma unroll
      for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* w = s[i][j * 2 + e / 2] + e % 2 * 2;
          weights[i][e] = pack<T>(w[0], w[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kD / 16; ++d) {
        uint32_t v[4];
        ptx::ldmatrix_trans(v, chunk_from(v_row, d * 2) + j * k16Rows);
        if (masked && fault != AttentionFault::kZeroTimesNaN) {
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
    return poison != 0;
  }

  // What multiply_values left out, for the rows that do see it: rare, so slow is good enough.
  DLM_DEVICE void add_not_finite(int32_t slot, Mask bits, uint32_t v_tile) {
#pragma unroll 1
    for (int key = 0; key < kWarpKeys; ++key) {
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
        const uint4 eight = ptx::ld_shared_16(v_tile + chunk_offset<kChunks>(warp_key + key, d));
        const uint32_t left = lane & 1 ? eight.y : eight.x, right = lane & 1 ? eight.w : eight.z;
        const uint32_t pair = lane & 2 ? right : left;
        const uint32_t wrong = not_finite<T>(pair);
        if (wrong == 0) continue;
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = row_of(i, e / 2);
            const bool visible = (seen_by(row, slot, bits) >> key & 1) && in_order(row, slot + key);
            const uint32_t element = e % 2 ? pair >> 16 : pair & 0xffffu;
            if (visible && (wrong >> (e % 2 * 16 + 15) & 1)) {
              sums[i][d][e] += to_float(T{uint16_t(element)});
            }
          }
        }
      }
    }
  }

  // --- the end ---

  // Where a row's four columns lie in the tile of sums: even chunks left, odd ones right, since 8
  // lanes read every other chunk of a row; and half a warp writes 2 chunks of 4 rows.
  DLM_DEVICE static uint32_t sum_chunk(int row, int chunk) {
    const int odd = chunk & 1, place = chunk / 2 + odd * (kSumChunks / 2);
    return uint32_t(row * kSumChunks + (place ^ ((row & 3) * 2 + odd)));
  }

  // This warp's sums and norms to shared memory.
  DLM_DEVICE void share(float* arena, Norm* norms) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = key_warp * kRows + row_of(i, half);
        Norm n = norm[i][half];
        n.sum += __shfl_xor_sync(~0u, n.sum, 1);
        n.sum += __shfl_xor_sync(~0u, n.sum, 2);
        if (lane % 4 == 0) norms[row] = n;
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
          float* to = arena + sum_chunk(row, d * 2 + lane % 4 / 2) * 4 + lane % 2 * 2;
          *reinterpret_cast<float2*>(to) =
              make_float2(sums[i][d][half * 2], sums[i][d][half * 2 + 1]);
        }
      }
    }
  }

  // Merges the warps that shared the keys, in order, and stores the rows: 8 columns a thread.
  DLM_DEVICE void finish(uint32_t arena, const Norm* norms) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kRows * kChunks; i += kAttendThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (place.first_row + row >= p.rows) break;
      const bool sees = limits.low[row] < limits.high[row];
      Norm n;
      for (int w = 0; w < Tiling::kKeyWarps; ++w) {
        n.maximum = fmaxf(n.maximum, norms[w * kRows + row].maximum);
      }
      float sum[8] = {};
#pragma unroll 1
      for (int w = 0; w < Tiling::kKeyWarps; ++w) {
        const Norm part = norms[w * kRows + row];
        const float weight = fault == AttentionFault::kMaximaMixed
                                 ? 1.0f
                                 : ptx::exp2_approx(part.maximum - base_of(n.maximum));
        n.sum = fmaf(part.sum, weight, n.sum);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 four =
              as_floats(ptx::ld_shared_16(arena + sum_chunk(w * kRows + row, chunk * 2 + c) * 16));
          sum[c * 4] = fmaf(four.x, weight, sum[c * 4]);
          sum[c * 4 + 1] = fmaf(four.y, weight, sum[c * 4 + 1]);
          sum[c * 4 + 2] = fmaf(four.z, weight, sum[c * 4 + 2]);
          sum[c * 4 + 3] = fmaf(four.w, weight, sum[c * 4 + 3]);
        }
      }
      if (!sees) n = Norm{};
      store_row(row, chunk, n, sum);
    }
  }

  DLM_DEVICE void store_row(int row, int chunk, Norm n, const float (&sum)[8]) const {
    const QueryRow at = query_row(p, place, row);
    const int64_t out_row = (place.b * p.op.Q + at.query) * p.op.H + at.head;
    if (p.splits > 1) {
      const int64_t part = out_row * p.splits + place.split;
      if (chunk == 0) p.partial_norm[part] = make_float2(n.maximum, n.sum);
      if (n.sum == 0.0f) return;  // the sums are not read either
      float* to = p.partial + part * kD + chunk * 8;
      ptx::st_global_16(to, as_words(sum[0], sum[1], sum[2], sum[3]));
      ptx::st_global_16(to + 4, as_words(sum[4], sum[5], sum[6], sum[7]));
      return;
    }
    if (chunk == 0) p.op.lse[out_row] = log_sum_exp(n);
    uint32_t packed[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      packed[e] = pack<T>(normalised(sum[e * 2], n), normalised(sum[e * 2 + 1], n));
    }
    ptx::st_global_16(static_cast<T*>(p.op.out) + out_row * kD + chunk * 8,
                      make_uint4(packed[0], packed[1], packed[2], packed[3]));
  }
};

template <class T, int kD, AttendForm form, AttentionFault fault = AttentionFault::kNone>
__global__ void __launch_bounds__(kAttendThreads)
    attend_kernel(const __grid_constant__ AttendParams p) {
  Attend<T, kD, form, fault>(p).run();
}

}  // namespace dlm::cuda
