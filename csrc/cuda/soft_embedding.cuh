// SPDX-License-Identifier: Apache-2.0
// out = (sum of w_v E_v) / (sum of w_v), w_v = e^((z_v - max) / T).
//   weights   a block processes a row and one split of the vocabulary, and writes what the other
//             kernels read: the weights in E's type or, if logits have a floor, a bit for each kept
//             id; and their sums
//   product   a block processes 64 rows, 128 columns of E and one split, 32 ids per iteration:
//             tiles of the weights and of E are loaded by cp.async three iterations deep; 16-bit E
//             on tensor cores (a warp: 16 rows, 64 columns), float by FMAs (a thread: 8 rows, 4
//             columns)
//   merge     a thread adds the splits of one element, in order, and divides
//   gather    if logits have a floor, replaces the last two: a block processes a row and 1,024
//             columns, and reads the few rows of E that are kept, in the order of their ids
// Splits depend only on V, so a row's bits do not depend on the batch. Bytes: the logits once, E
// once per 64 rows (blocks that share a tile of it run at the same time), a row's weights written
// once and read once per 128 columns. Flops: 2 V D per row. Needs sm_80 (mma.sync, ldmatrix,
// cp.async).
#pragma once
#include <type_traits>

#include "cuda/soft_embedding.h"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

constexpr uint32_t kSoftThreads = 256, kTileRows = 64, kTileColumns = 128, kTileIds = 32;
constexpr uint32_t kTileStages = 3, kSoftWarps = kSoftThreads / 32;
constexpr uint32_t kGatherColumns = 4;  // per thread
constexpr int64_t kMaxSplits = 16;

// Sums of the weights of kept logits and of the others.
struct SoftSums {
  float kept, rest;
};

struct SoftLaunch {
  SoftEmbeddingParams op;
  void* weights;   // [N, splits * split_length] in E's type; null if logits have a floor
  uint32_t* kept;  // [N, splits * split_length / 32], one bit per id; null if they have none
  SoftSums* sums;  // [N,splits]
  float* partial;  // [splits,N,D]
  uint32_t row_tiles, column_tiles, splits, split_length;
  bool aligned;  // E's rows can be read in units of 16 bytes

  DLM_HD int64_t width() const { return int64_t(splits) * split_length; }
};

// Half values end at 6e-8, and are imprecise below 6e-5: weights are stored 2^15 times larger.
template <class T>
constexpr float kWeightUnit = std::is_same_v<T, Float16> ? 32768.0f : 1.0f;

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

// Eight logits starting at `first`, a multiple of 8; -inf from `end` on.
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

DLM_DEVICE SoftSums over_warp(SoftSums s) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    s.kept += __shfl_xor_sync(kAllLanes, s.kept, distance);
    s.rest += __shfl_xor_sync(kAllLanes, s.rest, distance);
  }
  return s;
}

// A row's weights, or which of them are kept, within a split; a thread computes 8 per iteration. L
// is the type of the logits, T that of E.
template <class L, class T>
class SoftWeights {
 public:
  static constexpr SmemSize smem() { return SmemSize{}.take<SoftSums>(kSoftWarps); }

  DLM_DEVICE SoftWeights(const SoftLaunch& job, SmemCarver& smem)
      : job_(job),
        of_warp_(smem.take<SoftSums>(kSoftWarps)),
        n_(blockIdx.x / job.splits),
        split_(blockIdx.x % job.splits),
        row_(job.op, n_) {}

  DLM_DEVICE void run() {
    const uint32_t begin = split_ * job_.split_length, stop = begin + job_.split_length;
    SoftSums mine{0.0f, 0.0f};
#pragma unroll 1
    for (uint32_t turn = begin; turn < stop; turn += kSoftThreads * 8) {
      const uint32_t first = turn + threadIdx.x * 8;  // beyond stop for some, at the end
      float z[8];
      read(first, min(stop, uint32_t(job_.op.V)), z);
      if (job_.kept) {
        keep(first, stop, z, mine);
      } else {
        weigh(first, stop, z, mine);
      }
    }
    mine = over_warp(mine);
    if (lane_index() == 0) of_warp_[warp_index()] = mine;
    __syncthreads();
    mine = over_warp(lane_index() < kSoftWarps ? of_warp_[lane_index()] : SoftSums{0.0f, 0.0f});
    if (threadIdx.x == 0) job_.sums[int64_t(n_) * job_.splits + split_] = mine;
  }

 private:
  DLM_DEVICE void read(uint32_t first, uint32_t end, float (&z)[8]) const {
    if (row_.source >= 0 && first < end)
      return read_eight<L>(job_.op.logits, row_.source * job_.op.logits_stride, first, end, z);
#pragma unroll
    for (float& x : z) x = -INFINITY;
  }

  DLM_DEVICE void weigh(uint32_t first, uint32_t stop, const float (&z)[8], SoftSums& mine) const {
    float w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = row_.weight(z[j]);
    mine.kept += ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
    if (first >= stop) return;
    uint4* to = reinterpret_cast<uint4*>(static_cast<T*>(job_.weights) + n_ * job_.width() + first);
    if constexpr (sizeof(T) == 2) {
      *to = make_uint4(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        to[c] = make_uint4(float_to_bits(w[4 * c]), float_to_bits(w[4 * c + 1]),
                           float_to_bits(w[4 * c + 2]), float_to_bits(w[4 * c + 3]));
      }
    }
  }
  static DLM_DEVICE uint32_t pack(float low, float high) {
    return std::is_same_v<T, BFloat16> ? ptx::pack_bf16(low, high)
                                       : ptx::pack_f16(low * kWeightUnit<T>, high * kWeightUnit<T>);
  }

  DLM_DEVICE void keep(uint32_t first, uint32_t stop, const float (&z)[8], SoftSums& mine) const {
    const float floor = job_.op.floor[n_];
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const bool keeps = z[j] > -INFINITY && fminf(z[j], kLargestFloat) >= floor;
      (keeps ? mine.kept : mine.rest) += row_.weight(z[j]);
      bits |= uint32_t(keeps) << (lane_index() % 4 * 8 + j);
    }
    bits |= __shfl_xor_sync(kAllLanes, bits, 1);  // the ids of four threads form a word
    bits |= __shfl_xor_sync(kAllLanes, bits, 2);
    if (lane_index() % 4 == 0 && first < stop) job_.kept[(n_ * job_.width() + first) / 32] = bits;
  }

  const SoftLaunch& job_;
  SoftSums* const of_warp_;
  const uint32_t n_, split_;
  const SoftRow row_;
};

template <class L, class T>
__global__ void __launch_bounds__(kSoftThreads)
    soft_weights_kernel(const __grid_constant__ SoftLaunch job) {
  SmemCarver smem;
  SoftWeights<L, T>(job, smem).run();
}

template <class T>
class SoftProduct {
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr uint32_t kPer = 16 / sizeof(T);
  static constexpr uint32_t kChunks = kTileColumns / kPer;    // per row of a tile of E
  static constexpr uint32_t kWeightChunks = kTileIds / kPer;  // per row of a tile of weights
  static constexpr uint32_t kTileBytes = kTileIds * kTileColumns * sizeof(T);
  static constexpr uint32_t kWeightBytes = kTileRows * kTileIds * sizeof(T);
  static constexpr int kSums = 32;  // per thread

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<unsigned char>(kTileStages * kTileBytes)
        .template take<unsigned char>(kTileStages * kWeightBytes);
  }

  DLM_DEVICE SoftProduct(const SoftLaunch& job, SmemCarver& smem)
      : job_(job),
        p_(job.op),
        tiles_(ptx::smem_address(smem.take<unsigned char>(kTileStages * kTileBytes))),
        weights_(ptx::smem_address(smem.take<unsigned char>(kTileStages * kWeightBytes))),
        first_row_(blockIdx.x % job.row_tiles * kTileRows),
        first_column_(blockIdx.x / job.row_tiles % job.column_tiles * kTileColumns),
        split_(blockIdx.x / job.row_tiles / job.column_tiles),
        begin_(split_ * job.split_length),
        end_(min(uint32_t(p_.V), begin_ + job.split_length)) {}

  DLM_DEVICE void run() {
    const uint32_t turns = (end_ - begin_ + kTileIds - 1) / kTileIds;
#pragma unroll
    for (uint32_t turn = 0; turn + 1 < kTileStages; ++turn) load(turn);
    float sums[kSums] = {};
#pragma unroll 1
    for (uint32_t turn = 0; turn < turns; ++turn) {
      ptx::cp_async_wait<kTileStages - 2>();
      // Publishes this iteration's tiles; all threads have finished the previous iteration.
      __syncthreads();
      load(turn + kTileStages - 1);
      multiply(tiles_ + turn % kTileStages * kTileBytes,
               weights_ + turn % kTileStages * kWeightBytes, sums);
    }
    store(sums);
  }

 private:
  // Byte offsets of 16-byte chunks. Eight rows of one chunk are in different banks when ldmatrix
  // reads them, and two rows when rows of floats are written.
  static DLM_DEVICE uint32_t tile_offset(uint32_t id, uint32_t chunk) {
    return (id * kChunks + (kTensorCores ? chunk ^ (id & 7) : chunk)) * 16;
  }
  static DLM_DEVICE uint32_t weight_offset(uint32_t row, uint32_t chunk) {
    return (row * kWeightChunks + (chunk ^ (kTensorCores ? row / 2 & 3 : row & 1))) * 16;
  }

  // Starts copying the tiles of an iteration; everything out of range becomes zero.
  DLM_DEVICE void load(uint32_t turn) const {
    load_weights(turn);
    load_tile(turn);
    ptx::cp_async_commit();
  }
  // Beyond the vocabulary, up to the end of the last split, the weights themselves are zero.
  DLM_DEVICE void load_weights(uint32_t turn) const {
    const uint32_t to = weights_ + turn % kTileStages * kWeightBytes;
    const uint32_t first = begin_ + turn * kTileIds;
    const T* weights = static_cast<const T*>(job_.weights);
#pragma unroll
    for (uint32_t i = threadIdx.x; i < kTileRows * kWeightChunks; i += kSoftThreads) {
      const uint32_t row = i / kWeightChunks, chunk = i % kWeightChunks;
      const int64_t n = int64_t(first_row_) + row;
      const bool within = n < p_.N && first < end_;
      const T* from = weights + (within ? n * job_.width() + first + chunk * kPer : 0);
      ptx::cp_async_16(to + weight_offset(row, chunk), from, within);
    }
  }
  DLM_DEVICE void load_tile(uint32_t turn) const {
    const uint32_t to = tiles_ + turn % kTileStages * kTileBytes, first = begin_ + turn * kTileIds;
    const uint32_t D = uint32_t(p_.D);
    const T* table = static_cast<const T*>(p_.weight);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kTileIds * kChunks; i += kSoftThreads) {
      const uint32_t id = i / kChunks, chunk = i % kChunks, column = first_column_ + chunk * kPer;
      const uint32_t address = to + tile_offset(id, chunk);
      const bool within = first + id < end_ && column < D;
      const T* from = table + (within ? (first + id) * p_.weight_stride + column : 0);
      if (job_.aligned) {
        ptx::cp_async_16(address, from, within);
      } else {
        ptx::st_shared_16(address, elements(from, within ? min(D - column, kPer) : 0));
      }
    }
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

  // sums += weights * tile
  DLM_DEVICE void multiply(uint32_t tile, uint32_t weights, float (&sums)[kSums]) const {
    const uint32_t warp = warp_index(), lane = lane_index();
    if constexpr (kTensorCores) {
      const uint32_t row = warp / 2 * 16, chunk0 = warp % 2 * 8;
#pragma unroll
      for (uint32_t k = 0; k < kTileIds; k += 16) {
        uint32_t a[4];
        ptx::ldmatrix(a, weights + weight_offset(row + lane % 16, k / 8 + lane / 16));
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
        job_.partial[(split_ * p_.N + n) * p_.D + d] = sums[i] * (1.0f / kWeightUnit<T>);
    }
  }

  const SoftLaunch& job_;
  const SoftEmbeddingParams& p_;
  const uint32_t tiles_, weights_;  // shared addresses
  const uint32_t first_row_, first_column_, split_;
  const uint32_t begin_, end_;  // of the split
};

template <class T>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_product_kernel(const __grid_constant__ SoftLaunch job) {
  SmemCarver smem;
  SoftProduct<T>(job, smem).run();
}

// Adds the sums of all splits, in order.
DLM_DEVICE SoftSums row_sums(const SoftLaunch& job, int64_t n) {
  SoftSums total{0.0f, 0.0f};
  for (uint32_t s = 0; s < job.splits; ++s) {
    total.kept += job.sums[n * job.splits + s].kept;
    total.rest += job.sums[n * job.splits + s].rest;
  }
  return total;
}

// One thread per element.
template <class T>
__global__ void __launch_bounds__(kSoftThreads)
    soft_merge_kernel(const __grid_constant__ SoftLaunch job) {
  const SoftEmbeddingParams& p = job.op;
  const uint32_t blocks = uint32_t((p.D + kSoftThreads - 1) / kSoftThreads);
  const int64_t n = blockIdx.x / blocks, d = blockIdx.x % blocks * kSoftThreads + threadIdx.x;
  if (d >= p.D) return;
  float sum = 0.0f;
  for (uint32_t s = 0; s < job.splits; ++s) sum += job.partial[(s * p.N + n) * p.D + d];
  const float total = row_sums(job, n).kept;
  static_cast<T*>(p.out)[n * p.D + d] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
}

// One word of kept ids per thread and iteration; a thread sums four columns.
template <class T>
class SoftGather {
 public:
  static constexpr SmemSize smem() {
    return SmemSize{}.take<uint32_t>(2 * kSoftWarps).take<uint32_t>(2 * kSoftThreads);
  }
  DLM_DEVICE SoftGather(const SoftLaunch& job, SmemCarver& smem)
      : job_(job),
        p_(job.op),
        any_(smem.take<uint32_t>(2 * kSoftWarps)),
        words_(smem.take<uint32_t>(2 * kSoftThreads)),
        n_(blockIdx.x / job.column_tiles),
        column_(blockIdx.x % job.column_tiles * kSoftThreads * kGatherColumns + threadIdx.x),
        row_(p_, n_) {}

  DLM_DEVICE void run() {
    float sum[kGatherColumns] = {};
    const uint32_t words = uint32_t(job_.width() / 32);
#pragma unroll 1
    for (uint32_t turn = 0; turn * kSoftThreads < words; ++turn) add_turn(turn, words, sum);
    finish(sum);
  }

 private:
  // The words of two iterations are stored side by side, so that one barrier per iteration
  // separates writers and readers.
  DLM_DEVICE void add_turn(uint32_t turn, uint32_t words, float (&sum)[kGatherColumns]) const {
    const uint32_t at = turn * kSoftThreads + threadIdx.x;
    const uint32_t own = at < words ? job_.kept[int64_t(n_) * words + at] : 0;
    uint32_t* any = any_ + turn % 2 * kSoftWarps;
    uint32_t* word = words_ + turn % 2 * kSoftThreads;
    const uint32_t threads = __ballot_sync(kAllLanes, own != 0);
    if (lane_index() == 0) any[warp_index()] = threads;
    word[threadIdx.x] = own;
    __syncthreads();
#pragma unroll 1
    for (uint32_t warp = 0; warp < kSoftWarps; ++warp) {
#pragma unroll 1
      for (uint32_t left = any[warp]; left; left &= left - 1) {
        const uint32_t thread = warp * 32 + uint32_t(__ffs(int(left)) - 1);
#pragma unroll 1
        for (uint32_t bits = word[thread]; bits; bits &= bits - 1)
          add((turn * kSoftThreads + thread) * 32 + uint32_t(__ffs(int(bits)) - 1), sum);
      }
    }
  }

  DLM_DEVICE void add(uint32_t id, float (&sum)[kGatherColumns]) const {
    const float w = row_.weight(SoftRow::logit(p_, row_.source, id));
    const T* e = static_cast<const T*>(p_.weight) + id * p_.weight_stride;
#pragma unroll
    for (uint32_t j = 0; j < kGatherColumns; ++j) {
      const uint32_t d = column_ + j * kSoftThreads;
      if (d < p_.D) sum[j] = __fmaf_rn(w, to_float(e[d]), sum[j]);
    }
  }

  DLM_DEVICE void finish(const float (&sum)[kGatherColumns]) const {
    const SoftSums s = row_sums(job_, n_);
    const bool mixes = p_.mask_token_id >= 0;
    const float total = mixes ? s.kept + s.rest : s.kept;
    const float scale = total > 0.0f ? 1.0f / total : 0.0f, share = mixes ? s.rest * scale : 0.0f;
    const T* mask =
        static_cast<const T*>(p_.weight) + (mixes ? p_.mask_token_id * p_.weight_stride : 0);
    T* out = static_cast<T*>(p_.out) + int64_t(n_) * p_.D;
#pragma unroll
    for (uint32_t j = 0; j < kGatherColumns; ++j) {
      const uint32_t d = column_ + j * kSoftThreads;
      if (d >= p_.D) continue;
      const float value = sum[j] * scale;
      out[d] = from_float<T>(share > 0.0f ? __fmaf_rn(share, to_float(mask[d]), value) : value);
    }
  }

  const SoftLaunch& job_;
  const SoftEmbeddingParams& p_;
  uint32_t* const any_;    // per warp, one bit for each thread whose word is not zero
  uint32_t* const words_;  // one per thread
  const uint32_t n_, column_;
  const SoftRow row_;
};

template <class T>
__global__ void __launch_bounds__(kSoftThreads)
    soft_gather_kernel(const __grid_constant__ SoftLaunch job) {
  SmemCarver smem;
  SoftGather<T>(job, smem).run();
}

inline uint32_t soft_split_length(const SoftEmbeddingParams& p) {
  const int64_t tiles = (p.V + kTileIds - 1) / kTileIds, least = 2048 / kTileIds;
  const int64_t share = (tiles + kMaxSplits - 1) / kMaxSplits;
  return uint32_t((share < least ? least : share) * kTileIds);
}

// `workspace` has soft_workspace_of(p) bytes.
inline SoftLaunch soft_launch(const SoftEmbeddingParams& p, void* workspace) {
  const auto tiles = [](int64_t items, int64_t size) {
    return uint32_t((items + size - 1) / size);
  };
  const int64_t size = p.weight_dtype == DType::kFloat32 ? 4 : 2;
  SoftLaunch job{};
  job.op = p;
  job.row_tiles = tiles(p.N, kTileRows);
  job.column_tiles = tiles(p.D, p.floor ? kSoftThreads * kGatherColumns : kTileColumns);
  job.split_length = soft_split_length(p);
  job.splits = tiles(p.V, job.split_length);
  char* next = static_cast<char*>(workspace);
  const auto take = [&next](int64_t bytes) {
    char* taken = next;
    next += bytes;
    return static_cast<void*>(taken);
  };
  if (p.floor) {
    job.kept = static_cast<uint32_t*>(take(p.N * job.width() / 8));
  } else {
    job.weights = take(p.N * job.width() * size);
  }
  job.sums = static_cast<SoftSums*>(take(p.N * job.splits * int64_t(sizeof(SoftSums))));
  job.partial = static_cast<float*>(static_cast<void*>(next));
  job.aligned = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 &&
                p.weight_stride * size % 16 == 0 && p.D * size % 16 == 0;
  return job;
}

inline int64_t soft_workspace_of(const SoftEmbeddingParams& p) {
  const SoftLaunch job = soft_launch(p, nullptr);
  const int64_t partial = p.floor ? 0 : job.splits * p.N * p.D * int64_t(sizeof(float));
  return int64_t(reinterpret_cast<uintptr_t>(job.partial)) + partial;
}

inline const char* why_not_soft_embedding(const SoftEmbeddingParams& p) {
  const int64_t row_tiles = (p.N + kTileRows - 1) / kTileRows,
                column_tiles = (p.D + kTileColumns - 1) / kTileColumns;
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  const int64_t blocks[] = {row_tiles * column_tiles * kMaxSplits, p.N * kMaxSplits,
                            p.N * ((p.D + kSoftThreads - 1) / kSoftThreads)};
  for (const int64_t n : blocks) {
    if (n > 0x7fffffff) return "logits must have fewer rows";
  }
  return nullptr;
}

template <class T>
cudaError_t start_soft_weights(const SoftLaunch& job, cudaStream_t stream) {
  const SoftEmbeddingParams& p = job.op;
  const auto kernel = p.dtype == DType::kFloat32    ? soft_weights_kernel<float, T>
                      : p.dtype == DType::kBFloat16 ? soft_weights_kernel<BFloat16, T>
                                                    : soft_weights_kernel<Float16, T>;
  return launch(kernel, dim3(uint32_t(p.N) * job.splits), dim3(kSoftThreads),
                SoftWeights<float, T>::smem().bytes, stream, job);
}

template <class T>
cudaError_t start_soft_rows(const SoftLaunch& job, cudaStream_t stream) {
  const SoftEmbeddingParams& p = job.op;
  const dim3 threads(kSoftThreads);
  cudaError_t error = start_soft_weights<T>(job, stream);
  if (error != cudaSuccess) return error;
  if (p.floor) {
    return launch(soft_gather_kernel<T>, dim3(uint32_t(p.N) * job.column_tiles), threads,
                  SoftGather<T>::smem().bytes, stream, job);
  }
  error = launch(soft_product_kernel<T>, dim3(job.row_tiles * job.column_tiles * job.splits),
                 threads, SoftProduct<T>::smem().bytes, stream, job);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * ((p.D + kSoftThreads - 1) / kSoftThreads);
  return launch(soft_merge_kernel<T>, dim3(uint32_t(blocks)), threads, 0, stream, job);
}

inline cudaError_t start_soft_embedding(const SoftEmbeddingParams& p, void* workspace,
                                        cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return cudaSuccess;
  const SoftLaunch job = soft_launch(p, workspace);
  if (p.weight_dtype == DType::kFloat32) return start_soft_rows<float>(job, stream);
  if (p.weight_dtype == DType::kFloat16) return start_soft_rows<Float16>(job, stream);
  return start_soft_rows<BFloat16>(job, stream);
}

}  // namespace dlm::cuda
