// SPDX-License-Identifier: Apache-2.0
// Logits of some rows and one chunk of the vocabulary: products of hidden states and weights. Both
// are loaded to shared memory 128 bytes of each row at a time, the next ones while the current ones
// are multiplied. 16-bit elements are multiplied by tensor cores, float32 elements one by one. A
// logit's sum runs through the columns in order, so its bits depend only on its row and token.
#pragma once
#include <type_traits>

#include "common/race.h"
#include "cuda/tiles.cuh"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

constexpr uint32_t kHeadThreads = 256, kHeadWarps = kHeadThreads / 32;
constexpr uint32_t kHeadStages = 2;
constexpr uint32_t kSliceBytes = 128, kSliceChunks = kSliceBytes / 16;  // per row and stage

// The logits of a block in shared memory: rows of kRaceChunk, padded by 16 bytes so that the eight
// rows of a fragment are in different banks.
template <class T>
constexpr uint32_t kLogitsPitch = kRaceChunk * sizeof(T) + 16;

// Product on tensor cores. A warp has all rows and some of the tokens; if there are many rows, half
// of them.
template <class T, int kRows>
class HeadProduct {
  static constexpr int kRowWarps = kRows > 64 ? 2 : 1, kTokenWarps = int(kHeadWarps) / kRowWarps;
  static constexpr int kBlocks16 = kRows / 16 / kRowWarps, kTokens = kRaceChunk / kTokenWarps;
  static constexpr int kSlice = kSliceBytes / sizeof(T);

 public:
  DLM_DEVICE HeadProduct()
      : row_(int(warp_index()) % kRowWarps * kBlocks16 * 16),
        token_(int(warp_index()) / kRowWarps * kTokens) {}

  // `hidden` and `weights` are tiles with rows of kSliceBytes.
  DLM_DEVICE void add(uint32_t hidden, uint32_t weights) {
    multiply_tiles<T, kSlice>(sums_, hidden, row_, weights, token_);
  }
  DLM_DEVICE void leave(unsigned char* logits) const {
    const int lane = int(lane_index());
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_ + i * 16 + half * 8 + lane / 4;
        unsigned char* to = logits + row * int(kLogitsPitch<T>) + (token_ + lane % 4 * 2) * 2;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          *reinterpret_cast<uint32_t*>(to + j * 16) =
              pack<T>(sums_[i][j][half * 2], sums_[i][j][half * 2 + 1]);
        }
      }
    }
  }

 private:
  const int row_, token_;
  Scores<kBlocks16, kTokens / 8> sums_ = {};
};

// Product in float32. A thread has one token and all rows.
template <int kRows>
class HeadProduct<float, kRows> {
  static_assert(kHeadThreads == kRaceChunk);

 public:
  DLM_DEVICE void add(uint32_t hidden, uint32_t weights) {
#pragma unroll 1
    for (int c = 0; c < int(kSliceChunks); ++c) {
      const float4 w =
          as_floats(ptx::ld_shared_16(weights + chunk_offset<kSliceChunks>(int(threadIdx.x), c)));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 h = as_floats(ptx::ld_shared_16(hidden + chunk_offset<kSliceChunks>(r, c)));
        sums_[r] = __fmaf_rn(h.x, w.x, sums_[r]);
        sums_[r] = __fmaf_rn(h.y, w.y, sums_[r]);
        sums_[r] = __fmaf_rn(h.z, w.z, sums_[r]);
        sums_[r] = __fmaf_rn(h.w, w.w, sums_[r]);
      }
    }
  }
  DLM_DEVICE void leave(unsigned char* logits) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reinterpret_cast<float*>(logits + r * int(kLogitsPitch<float>))[threadIdx.x] = sums_[r];
    }
  }

 private:
  float sums_[kRows] = {};
};

// Columns [0, D) of kRows rows of hidden states and of kRaceChunk rows of weights, of which the
// first `tokens` exist; missing elements are zero.
template <class T, int kRows>
class HeadSlices {
  static constexpr uint32_t kWeightBytes = kRaceChunk * kSliceBytes;
  static constexpr uint32_t kStageBytes = kWeightBytes + kRows * kSliceBytes;
  static constexpr uint32_t kStep = kHeadThreads / kSliceChunks;  // rows

 public:
  static constexpr uint32_t kBytes = kHeadStages * kStageBytes;

  // `hidden` is an array in shared memory with the address of each row; null means all zero.
  // `aligned`: rows start at multiples of 16 bytes, and their length is a multiple of 16 bytes.
  DLM_DEVICE HeadSlices(uint32_t ring, const T* const* hidden, const T* weight,
                        int64_t weight_stride, uint32_t tokens, uint32_t D, bool aligned)
      : ring_(ring),
        hidden_(hidden),
        weight_(weight),
        stride_(weight_stride),
        tokens_(tokens),
        D_(D),
        aligned_(aligned) {}

  // Computes all products, by the whole block; afterwards its shared memory is free.
  template <class Product>
  DLM_DEVICE void multiply(Product& product) const {
    const uint32_t slices = (D_ + kPerSlice - 1) / kPerSlice;
#pragma unroll
    for (uint32_t s = 0; s + 1 < kHeadStages; ++s) start(s, slices);
#pragma unroll 1
    for (uint32_t s = 0; s < slices; ++s) {
      ptx::cp_async_wait<kHeadStages - 2>();
      __syncthreads();  // the data that has arrived is visible to all threads, and the
                        // previous stage is free
      start(s + kHeadStages - 1, slices);
      const uint32_t weights = stage(s);
      product.add(weights + kWeightBytes, weights);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  static constexpr uint32_t kPerSlice = kSliceBytes / sizeof(T);

  DLM_DEVICE uint32_t stage(uint32_t slice) const {
    return ring_ + slice % kHeadStages * kStageBytes;
  }
  DLM_DEVICE void start(uint32_t slice, uint32_t slices) const {
    if (slice < slices) aligned_ ? load<true>(slice) : load<false>(slice);
    ptx::cp_async_commit();  // empty groups too, so that a slice's group is always as far back
  }

  template <bool aligned>
  DLM_DEVICE void load(uint32_t slice) const {
    const uint32_t row0 = threadIdx.x / kSliceChunks, chunk = threadIdx.x % kSliceChunks;
    const uint32_t column = slice * kPerSlice + chunk * kPerChunk<T>;
    const auto bring = [&](uint32_t tile, uint32_t row, const T* from, bool exists) {
      const uint32_t to = tile + chunk_offset<kSliceChunks>(int(row), int(chunk));
      exists &= column < D_;
      if constexpr (aligned) {
        ptx::cp_async_16(to, exists ? from + column : weight_, exists);
      } else {
        ptx::st_shared_16(to, exists ? edge_chunk(from, column, D_, 0) : make_uint4(0, 0, 0, 0));
      }
    };
    const uint32_t weights = stage(slice), hidden = weights + kWeightBytes;
#pragma unroll(aligned ? 8 : 1)
    for (uint32_t row = row0; row < kRaceChunk; row += kStep)
      bring(weights, row, weight_ + row * stride_, row < tokens_);
#pragma unroll(aligned ? 4 : 1)
    for (uint32_t row = row0; row < kRows; row += kStep)
      bring(hidden, row, hidden_[row], hidden_[row] != nullptr);
  }

  const uint32_t ring_;
  const T* const* const hidden_;
  const T* const weight_;
  const int64_t stride_;
  const uint32_t tokens_, D_;
  const bool aligned_;
};

}  // namespace dlm::cuda
