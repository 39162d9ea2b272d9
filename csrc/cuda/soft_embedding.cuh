// SPDX-License-Identifier: Apache-2.0
// out = (sum of w_v E_v) / (sum of w_v), w_v = e^((z_v - max) / T): a product whose left factor is
// made of logits on the way.
//   product   a block takes 64 rows, 128 columns of E and one split of the vocabulary, 32 ids a
//             turn: tiles of E come by cp.async three turns deep, each thread makes 8 weights of a
//             turn; E of 16 bits on tensor cores (a warp: 16 rows, 64 columns), float by FMAs (a
//             thread: 8 rows, 4 columns)
//   merge     a thread adds one element's splits, in their order, and divides
//   filtered  where logits have a floor, a block takes a row and reads the few rows of E that are
//             kept, in the order of their ids
// Splits depend on V alone, so a row's bits do not depend on the batch. Bytes: E once for 64 rows
// (blocks that share a tile of it run together); flops 2 V D a row. Up to some 64 rows memory is
// the limit, then the tensor cores and the weights, which are made again for every 128 columns.
// Needs sm_80 (mma.sync, ldmatrix, cp.async).
#pragma once
#include <type_traits>

#include "cuda/soft_embedding.h"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

enum class SoftFault {
  kNone,
  kLaxWait,
  kNoBarrier,
  kOverread,
  kUnmaskedTail,
  kSplitsOverlap,
  kSumsOnce,
  kSwappedRegisters,
  kHitsReadTooEarly,
};

constexpr uint32_t kSoftThreads = 256, kTileRows = 64, kTileColumns = 128, kTileIds = 32;
constexpr uint32_t kTileStages = 3, kSoftWarps = kSoftThreads / 32;
constexpr int64_t kMaxSplits = 16;

struct SoftLaunch {
  SoftEmbeddingParams op;
  float *partial, *total;  // [splits,N,D], [splits,N]
  uint32_t row_tiles, column_tiles, splits, split_length;
  bool aligned;  // E's rows are read by 16 bytes
};

// A row's logits as weights.
struct SoftRow {
  int64_t source = -1;
  float max = 0.0f, scale = 0.0f;  // log2(e) / T

  DLM_DEVICE SoftRow(const SoftEmbeddingParams& p, uint32_t n) {
    if (n >= p.N) return;
    const int64_t row = p.row_map ? p.row_map[n] : int64_t(n), argmax = p.argmax[n];
    if (row < 0 || row >= p.R || argmax < 0) return;
    source = row;
    const float asked = row_value(p.temperature, n, 0.0f);
    scale = div_rn(1.44269504f, asked > 0.0f ? asked : 1.0f);
    max = fminf(logit(p, row, argmax), kLargestFloat);
  }
  DLM_DEVICE float weight(float z) const {
    const float w = ptx::exp2_approx((fminf(z, kLargestFloat) - max) * scale);
    return z == z ? w : 0.0f;
  }

  static DLM_DEVICE float logit(const SoftEmbeddingParams& p, int64_t row, int64_t v) {
    const int64_t at = row * p.logits_stride + v;
    if (p.dtype == DType::kFloat32) return static_cast<const float*>(p.logits)[at];
    const uint16_t bits = static_cast<const uint16_t*>(p.logits)[at];
    return p.dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }
};

// Eight logits from `first` on, a multiple of 8; -inf from `end` on.
template <class L>
DLM_DEVICE void read_eight(const void* logits, int64_t at, uint32_t first, uint32_t end,
                           float (&z)[8]) {
  const L* row = static_cast<const L*>(logits) + at;
#pragma unroll
  for (uint32_t c = 0; c < 8; c += kPerChunk<L>) {
    const uint4 v = load_chunk(row, first + c, end);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t j = 0; j < kPerChunk<L>; ++j)
      z[c + j] = Word<L>::value(words[j / Word<L>::kElements], j % Word<L>::kElements);
  }
}
DLM_DEVICE void read_eight(const SoftEmbeddingParams& p, int64_t source, uint32_t first,
                           uint32_t end, float (&z)[8]) {
  if (source < 0 || first >= end) {
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] = -INFINITY;
    return;
  }
  const int64_t at = source * p.logits_stride;
  if (p.dtype == DType::kFloat32) {
    read_eight<float>(p.logits, at, first, end, z);
  } else if (p.dtype == DType::kBFloat16) {
    read_eight<BFloat16>(p.logits, at, first, end, z);
  } else {
    read_eight<Float16>(p.logits, at, first, end, z);
  }
}

template <class T, SoftFault fault>
class SoftProduct {
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr uint32_t kPer = 16 / sizeof(T);
  static constexpr uint32_t kChunks = kTileColumns / kPer;    // of a row of a tile of E
  static constexpr uint32_t kWeightChunks = kTileIds / kPer;  // of a row of a tile of weights
  static constexpr uint32_t kTileBytes = kTileIds * kTileColumns * sizeof(T);
  static constexpr uint32_t kWeightBytes = kTileRows * kTileIds * sizeof(T);
  static constexpr int kSums = 32;  // of a thread
  // Halves end at 6e-8, and are imprecise from 6e-5 down: weights are kept 2^15 times larger.
  static constexpr float kUnit = std::is_same_v<T, Float16> ? 32768.0f : 1.0f;

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<unsigned char>(kTileStages * kTileBytes)
        .template take<unsigned char>(2 * kWeightBytes);
  }

  DLM_DEVICE SoftProduct(const SoftLaunch& job, SmemCarver& smem)
      : job_(job),
        p_(job.op),
        tiles_(ptx::smem_address(smem.take<unsigned char>(kTileStages * kTileBytes))),
        weights_(ptx::smem_address(smem.take<unsigned char>(2 * kWeightBytes))),
        first_row_(blockIdx.x % job.row_tiles * kTileRows),
        first_column_(blockIdx.x / job.row_tiles % job.column_tiles * kTileColumns),
        split_(blockIdx.x / job.row_tiles / job.column_tiles),
        row_(p_, first_row_ + threadIdx.x / 4) {
    const uint32_t V = uint32_t(p_.V);
    begin_ = split_ * job.split_length;
    end_ = min(V, begin_ + job.split_length);
    if (fault == SoftFault::kSplitsOverlap) end_ = min(V, end_ + job.split_length / 2);
  }

  DLM_DEVICE void run() {
    const uint32_t turns = (end_ - begin_ + kTileIds - 1) / kTileIds;
#pragma unroll
    for (uint32_t turn = 0; turn + 1 < kTileStages; ++turn) load_tile(turn);
    float z[8], sums[kSums] = {}, total = 0.0f;
    read_eight(p_, row_.source, own_id(0), end_, z);
#pragma unroll 1
    for (uint32_t turn = 0; turn < turns; ++turn) {
      total += store_weights(turn, z);
      ptx::cp_async_wait<fault == SoftFault::kLaxWait ? kTileStages - 1 : kTileStages - 2>();
      // Publishes this turn's tile and weights; all threads are done with the turn before.
      if (fault != SoftFault::kNoBarrier) __syncthreads();
      load_tile(turn + kTileStages - 1);
      read_eight(p_, row_.source, own_id(turn + 1), end_, z);
      multiply(tiles_ + turn % kTileStages * kTileBytes, weights_ + turn % 2 * kWeightBytes, sums);
    }
    store(sums);
    store_total(total);
  }

 private:
  // A thread makes the weights of row threadIdx.x / 4 and 8 ids.
  DLM_DEVICE uint32_t own_id(uint32_t turn) const {
    return begin_ + turn * kTileIds + threadIdx.x % 4 * 8;
  }

  // Byte offsets of 16-byte chunks. Eight rows of one chunk lie in different banks where ldmatrix
  // reads them, and two where rows of floats are written.
  static DLM_DEVICE uint32_t tile_offset(uint32_t id, uint32_t chunk) {
    return (id * kChunks + (kTensorCores ? chunk ^ (id & 7) : chunk)) * 16;
  }
  static DLM_DEVICE uint32_t weight_offset(uint32_t row, uint32_t chunk) {
    return (row * kWeightChunks + (chunk ^ (kTensorCores ? row / 2 & 3 : row & 1))) * 16;
  }

  // Starts copying a turn's rows of E; what lies outside becomes zero.
  DLM_DEVICE void load_tile(uint32_t turn) const {
    const uint32_t to = tiles_ + turn % kTileStages * kTileBytes, first = begin_ + turn * kTileIds;
    const uint32_t D = uint32_t(p_.D), limit = fault == SoftFault::kOverread ? end_ + 1 : end_;
    const T* table = static_cast<const T*>(p_.weight);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kTileIds * kChunks; i += kSoftThreads) {
      const uint32_t id = i / kChunks, chunk = i % kChunks, column = first_column_ + chunk * kPer;
      const uint32_t address = to + tile_offset(id, chunk);
      const bool within = first + id < limit && column < D;
      const T* from = table + (within ? (first + id) * p_.weight_stride + column : 0);
      if (job_.aligned) {
        ptx::cp_async_16(address, from, within);
      } else {
        ptx::st_shared_16(address, elements(from, within ? min(D - column, kPer) : 0));
      }
    }
    ptx::cp_async_commit();
  }
  // The first n elements of a chunk, then zeros.
  static DLM_DEVICE uint4 elements(const T* from, uint32_t n) {
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t j = 0; j < kPer; ++j) {
      if (j >= n) break;
      const uint32_t bits = Word<T>::bits(from[j]), half = j % Word<T>::kElements;
      words[j / Word<T>::kElements] |= half ? bits << 16 : bits;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Returns their sum.
  DLM_DEVICE float store_weights(uint32_t turn, const float (&z)[8]) const {
    float w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      w[j] = row_.weight(z[j]);
      if (fault == SoftFault::kUnmaskedTail && z[j] == -INFINITY) w[j] = 1.0f;
    }
    const uint32_t to = weights_ + turn % 2 * kWeightBytes, row = threadIdx.x / 4,
                   part = threadIdx.x % 4;
    if constexpr (kTensorCores) {
      ptx::st_shared_16(
          to + weight_offset(row, part),
          make_uint4(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7])));
    } else {
#pragma unroll
      for (uint32_t c = 0; c < 2; ++c) {
        ptx::st_shared_16(to + weight_offset(row, part * 2 + c),
                          make_uint4(float_to_bits(w[4 * c]), float_to_bits(w[4 * c + 1]),
                                     float_to_bits(w[4 * c + 2]), float_to_bits(w[4 * c + 3])));
      }
    }
    return ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
  }
  static DLM_DEVICE uint32_t pack(float low, float high) {
    return std::is_same_v<T, BFloat16> ? ptx::pack_bf16(low, high)
                                       : ptx::pack_f16(low * kUnit, high * kUnit);
  }

  // sums += weights * tile
  DLM_DEVICE void multiply(uint32_t tile, uint32_t weights, float (&sums)[kSums]) const {
    const uint32_t warp = warp_index(), lane = lane_index();
    if constexpr (kTensorCores) {
      const uint32_t row = warp / 2 * 16, chunk0 = warp % 2 * 8;
#pragma unroll
      for (uint32_t k = 0; k < kTileIds; k += 16) {
        uint32_t a[4];
        ptx::ldmatrix(a, weights + weight_offset(row + lane % 16, k / 8 + lane / 16));
        if (fault == SoftFault::kSwappedRegisters) {
          const uint32_t swap = a[1];
          a[1] = a[2];
          a[2] = swap;
        }
#pragma unroll
        for (uint32_t c = 0; c < 8; c += 2) {
          uint32_t b[4];
          ptx::ldmatrix_trans(b, tile + tile_offset(k + lane % 16, chunk0 + c + lane / 16));
          mma(sums + c * 4, a, b[0], b[1]);
          mma(sums + c * 4 + 4, a, b[2], b[3]);
        }
      }
    } else {
#pragma unroll 2
      for (uint32_t k = 0; k < kTileIds; k += 4) {
        float e[4][4];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j)
          unpack(ptx::ld_shared_16(tile + tile_offset(k + j, lane)), e[j]);
#pragma unroll
        for (uint32_t r = 0; r < 8; ++r) {
          float w[4];
          unpack(ptx::ld_shared_16(weights + weight_offset(warp * 8 + r, k / 4)), w);
#pragma unroll
          for (uint32_t j = 0; j < 4; ++j) {
#pragma unroll
            for (uint32_t d = 0; d < 4; ++d)
              sums[r * 4 + d] = __fmaf_rn(w[j], e[j][d], sums[r * 4 + d]);
          }
        }
      }
    }
  }
  static DLM_DEVICE void unpack(uint4 v, float (&x)[4]) {
    x[0] = bits_to_float(v.x);
    x[1] = bits_to_float(v.y);
    x[2] = bits_to_float(v.z);
    x[3] = bits_to_float(v.w);
  }
  static DLM_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    float (&sums)[4] = *reinterpret_cast<float (*)[4]>(c);
    if constexpr (std::is_same_v<T, BFloat16>) {
      ptx::mma_m16n8k16_bf16(sums, a, b0, b1);
    } else {
      ptx::mma_m16n8k16_f16(sums, a, b0, b1);
    }
  }

  DLM_DEVICE void store(const float (&sums)[kSums]) const {
    const uint32_t warp = warp_index(), lane = lane_index();
#pragma unroll
    for (uint32_t i = 0; i < kSums; ++i) {
      const uint32_t row =
          kTensorCores ? warp / 2 * 16 + lane / 4 + i / 2 % 2 * 8 : warp * 8 + i / 4;
      const uint32_t column =
          kTensorCores ? warp % 2 * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2 : lane * 4 + i % 4;
      const int64_t n = first_row_ + row, d = first_column_ + column;
      if (n < p_.N && d < p_.D)
        job_.partial[(split_ * p_.N + n) * p_.D + d] = sums[i] * (1.0f / kUnit);
    }
  }
  DLM_DEVICE void store_total(float total) const {
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const int64_t n = first_row_ + threadIdx.x / 4;
    if (first_column_ == 0 && threadIdx.x % 4 == 0 && n < p_.N)
      job_.total[split_ * p_.N + n] = total;
  }

  const SoftLaunch& job_;
  const SoftEmbeddingParams& p_;
  const uint32_t tiles_, weights_;  // shared addresses
  const uint32_t first_row_, first_column_, split_;
  const SoftRow row_;
  uint32_t begin_, end_;  // of the split
};

template <class T, SoftFault fault>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_product_kernel(const __grid_constant__ SoftLaunch job) {
  SmemCarver smem;
  SoftProduct<T, fault>(job, smem).run();
}

// A thread an element.
template <class T, SoftFault fault>
__global__ void __launch_bounds__(kSoftThreads)
    soft_merge_kernel(const __grid_constant__ SoftLaunch job) {
  const SoftEmbeddingParams& p = job.op;
  const uint32_t blocks = uint32_t((p.D + kSoftThreads - 1) / kSoftThreads);
  const int64_t n = blockIdx.x / blocks, d = blockIdx.x % blocks * kSoftThreads + threadIdx.x;
  if (d >= p.D) return;
  float sum = 0.0f, total = 0.0f;
  for (uint32_t s = 0; s < job.splits; ++s) {
    sum += job.partial[(s * p.N + n) * p.D + d];
    if (fault != SoftFault::kSumsOnce || s == 0) total += job.total[s * p.N + n];
  }
  static_cast<T*>(p.out)[n * p.D + d] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
}

// A block a row: some ids at a time, then what they keep, column by column.
template <class T, SoftFault fault>
class FilteredRow {
  static constexpr uint32_t kTurn = kSoftThreads * 8;  // ids

  // Weights of kept and of other logits.
  struct Sums {
    float kept, rest;
  };

 public:
  static constexpr SmemSize smem(uint32_t D) {
    return SmemSize{}
        .take<uint32_t>(2 * kSoftWarps)
        .take<uint32_t>(2 * kSoftThreads)
        .template take<Sums>(kSoftWarps)
        .template take<float>(D);
  }
  DLM_DEVICE FilteredRow(const SoftEmbeddingParams& p, SmemCarver& smem)
      : p_(p),
        any_(smem.take<uint32_t>(2 * kSoftWarps)),
        hits_(smem.take<uint32_t>(2 * kSoftThreads)),
        of_warp_(smem.take<Sums>(kSoftWarps)),
        sum_(smem.take<float>(uint32_t(p.D))),
        row_(p, blockIdx.x),
        D_(uint32_t(p.D)),
        V_(uint32_t(p.V)) {}

  DLM_DEVICE void run() {
    for (uint32_t d = threadIdx.x; d < D_; d += kSoftThreads) sum_[d] = 0.0f;  // this thread's
    Sums mine{0.0f, 0.0f};
    if (row_.source >= 0) {  // the whole block
#pragma unroll 1
      for (uint32_t turn = 0; turn * kTurn < V_; ++turn) add_turn(turn, mine);
    }
    mine = over_block(mine);
    finish(mine);
  }

 private:
  // Two turns' hits stand side by side: one barrier a turn keeps writers and readers apart.
  DLM_DEVICE void add_turn(uint32_t turn, Sums& mine) const {
    const uint32_t begin = turn * kTurn;
    const float floor = p_.floor[blockIdx.x];
    float z[8];
    read_eight(p_, row_.source, begin + threadIdx.x * 8, V_, z);
    uint32_t kept = 0;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const float w = row_.weight(z[j]);
      const bool keeps = z[j] > -INFINITY && fminf(z[j], kLargestFloat) >= floor;
      (keeps ? mine.kept : mine.rest) += w;
      kept |= uint32_t(keeps) << j;
    }
    uint32_t* any = any_ + turn % 2 * kSoftWarps;
    uint32_t* hits = hits_ + turn % 2 * kSoftThreads;
    const uint32_t threads = __ballot_sync(kAllLanes, kept != 0);
    if (lane_index() == 0) any[warp_index()] = threads;
    hits[threadIdx.x] = kept;
    if (fault != SoftFault::kHitsReadTooEarly) __syncthreads();
#pragma unroll 1
    for (uint32_t warp = 0; warp < kSoftWarps; ++warp) {
#pragma unroll 1
      for (uint32_t left = any[warp]; left; left &= left - 1) {
        const uint32_t thread = warp * 32 + uint32_t(__ffs(int(left)) - 1);
#pragma unroll 1
        for (uint32_t bits = hits[thread]; bits; bits &= bits - 1)
          add(begin + thread * 8 + uint32_t(__ffs(int(bits)) - 1));
      }
    }
  }

  DLM_DEVICE void add(uint32_t id) const {
    const float w = row_.weight(SoftRow::logit(p_, row_.source, id));
    const T* e = static_cast<const T*>(p_.weight) + id * p_.weight_stride;
    for (uint32_t d = threadIdx.x; d < D_; d += kSoftThreads)
      sum_[d] = __fmaf_rn(w, to_float(e[d]), sum_[d]);
  }

  static DLM_DEVICE Sums over_warp(Sums s) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      s.kept += __shfl_xor_sync(kAllLanes, s.kept, distance);
      s.rest += __shfl_xor_sync(kAllLanes, s.rest, distance);
    }
    return s;
  }
  DLM_DEVICE Sums over_block(Sums s) const {
    s = over_warp(s);
    if (lane_index() == 0) of_warp_[warp_index()] = s;
    __syncthreads();
    return over_warp(lane_index() < kSoftWarps ? of_warp_[lane_index()] : Sums{0.0f, 0.0f});
  }

  DLM_DEVICE void finish(Sums s) const {
    const bool mixes = p_.mask_token_id >= 0;
    const float total = mixes ? s.kept + s.rest : s.kept;
    const float scale = total > 0.0f ? 1.0f / total : 0.0f, share = mixes ? s.rest * scale : 0.0f;
    const T* mask =
        static_cast<const T*>(p_.weight) + (mixes ? p_.mask_token_id * p_.weight_stride : 0);
    T* out = static_cast<T*>(p_.out) + int64_t(blockIdx.x) * p_.D;
    for (uint32_t d = threadIdx.x; d < D_; d += kSoftThreads) {
      const float value = sum_[d] * scale;
      out[d] = from_float<T>(share > 0.0f ? __fmaf_rn(share, to_float(mask[d]), value) : value);
    }
  }

  const SoftEmbeddingParams& p_;
  uint32_t* const any_;   // of each warp's threads, a bit where there is a hit
  uint32_t* const hits_;  // of each thread's 8 ids, a bit where one is kept
  Sums* const of_warp_;
  float* const sum_;
  const SoftRow row_;
  const uint32_t D_, V_;
};

template <class T, SoftFault fault>
__global__ void __launch_bounds__(kSoftThreads)
    soft_filtered_kernel(const __grid_constant__ SoftEmbeddingParams p) {
  SmemCarver smem;
  FilteredRow<T, fault>(p, smem).run();
}

inline int64_t soft_split_length(const SoftEmbeddingParams& p) {
  const int64_t tiles = (p.V + kTileIds - 1) / kTileIds, least = 2048 / kTileIds;
  const int64_t share = (tiles + kMaxSplits - 1) / kMaxSplits;
  return (share < least ? least : share) * kTileIds;
}
inline int64_t soft_splits(const SoftEmbeddingParams& p) {
  return (p.V + soft_split_length(p) - 1) / soft_split_length(p);
}
inline int64_t soft_workspace_of(const SoftEmbeddingParams& p) {
  return p.floor ? 0 : soft_splits(p) * p.N * (p.D + 1) * int64_t(sizeof(float));
}

inline const char* why_not_soft_embedding(const SoftEmbeddingParams& p) {
  const int64_t row_tiles = (p.N + kTileRows - 1) / kTileRows,
                column_tiles = (p.D + kTileColumns - 1) / kTileColumns;
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  // Sums of a filtered row stand in shared memory.
  if (p.D > 16384) return "weight must have at most 16384 columns";
  if (row_tiles * column_tiles * kMaxSplits > 0x7fffffff || p.N * ((p.D + 255) / 256) > 0x7fffffff)
    return "logits must have fewer rows";
  return nullptr;
}

template <class T, SoftFault fault>
cudaError_t start_soft_rows(const SoftLaunch& job, cudaStream_t stream) {
  const SoftEmbeddingParams& p = job.op;
  const dim3 threads(kSoftThreads);
  if (p.floor) {
    return launch(soft_filtered_kernel<T, fault>, dim3(uint32_t(p.N)), threads,
                  FilteredRow<T, fault>::smem(uint32_t(p.D)).bytes, stream, p);
  }
  const cudaError_t error =
      launch(soft_product_kernel<T, fault>, dim3(job.row_tiles * job.column_tiles * job.splits),
             threads, SoftProduct<T, fault>::smem().bytes, stream, job);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * ((p.D + kSoftThreads - 1) / kSoftThreads);
  return launch(soft_merge_kernel<T, fault>, dim3(uint32_t(blocks)), threads, 0, stream, job);
}

// `workspace` has soft_workspace_of(p) bytes.
template <SoftFault fault = SoftFault::kNone>
cudaError_t start_soft_embedding(const SoftEmbeddingParams& p, void* workspace,
                                 cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return cudaSuccess;
  SoftLaunch job{};
  job.op = p;
  job.row_tiles = uint32_t((p.N + kTileRows - 1) / kTileRows);
  job.column_tiles = uint32_t((p.D + kTileColumns - 1) / kTileColumns);
  job.splits = uint32_t(soft_splits(p));
  job.split_length = uint32_t(soft_split_length(p));
  job.partial = static_cast<float*>(workspace);
  job.total = job.partial + job.splits * p.N * p.D;
  const int64_t size = p.weight_dtype == DType::kFloat32 ? 4 : 2;
  job.aligned = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 &&
                p.weight_stride * size % 16 == 0 && p.D * size % 16 == 0;
  if constexpr (fault == SoftFault::kNone) {
    if (p.weight_dtype == DType::kFloat32) return start_soft_rows<float, fault>(job, stream);
    if (p.weight_dtype == DType::kFloat16) return start_soft_rows<Float16, fault>(job, stream);
  }
  return start_soft_rows<BFloat16, fault>(job, stream);
}

}  // namespace dlm::cuda
