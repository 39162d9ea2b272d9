// SPDX-License-Identifier: Apache-2.0
// Accepts a prefix of each row's drafts and finds the token after it: see
// cpu/verify_drafts_generic.cpp for the formulas. Drafts are tested from single logits, one per
// lane, by the first warp of every block that needs the result. If one fails by ratio, race_chunks
// reads that draft's two rows of logits, 16 chunks per block, and finds each block's best chunk of
// max(p - q, 0) (common/race.h); verify_drafts, with one block per row, then races the tokens of
// the best of these. All arithmetic is the CPU's, bit for bit. Bytes: two rows of logits where a
// draft is rejected; about 40 operations per logit. Needs sm_80.
#pragma once
#include <algorithm>

#include "common/race.h"
#include "cuda/chunk_sum.cuh"
#include "cuda/token_confidence_row.cuh"
#include "cuda/verify_drafts.h"

namespace dlm::cuda {

constexpr uint32_t kVerifyThreads = 128, kVerifyWarps = kVerifyThreads / 32;
constexpr uint32_t kVerifyTurns = 4;  // chunks per warp
constexpr uint32_t kVerifyChunks = kVerifyWarps * kVerifyTurns;

// The best of some chunks or tokens. `value` holds the bits of a non-negative float; 0: there is
// none.
struct BestKey {
  uint32_t value, id;
};

template <class T>
class VerifyRow {
  static constexpr bool kTwoRuns = kPerChunk<T> == 4;

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}.take<uint32_t>(2).take<BestKey>(2 * kVerifyWarps);
  }

  DLM_DEVICE VerifyRow(const VerifyDraftsParams& p, uint32_t row, SmemCarver& smem)
      : p_(p),
        row_(row),
        V_(uint32_t(p.V)),
        W_(uint32_t(p.W)),
        first_draft_(int64_t(row_) * p.W),
        first_token_(int64_t(row_) * (p.W + 1)),
        accepted_(smem.take<uint32_t>(2)),
        of_warp_(smem.take<BestKey>(2 * kVerifyWarps)) {
    const float temperature = row_value(p.temperature, row_, 0.0f);
    by_ratio_ = p.draft_logits && temperature > 0.0f;
    if (!by_ratio_) return;
    inverse_ = div_rn(1.0f, temperature);
    seed_ = uint64_t(row_value(p.random.seed, row_, int64_t(0)));
    step_ = uint32_t(row_value(p.random.step, row_, 0));
    position_ = uint32_t(p.random.position[row_]);
  }

  // Called by each of the blocks that share the row's chunks.
  DLM_DEVICE void race_chunks(uint32_t block, BestKey* best_of_row) {
    find_failure();
    if (!accepted_[1]) return;  // block-uniform
    const BestKey best = best_of_block(best_chunk(accepted_[0], block * kVerifyChunks), of_warp_);
    if (threadIdx.x == 0) best_of_row[block] = best;
  }

  DLM_DEVICE void finish(uint32_t blocks, const BestKey* best_of_row) {
    find_failure();
    const uint32_t accepted = accepted_[0];
    int64_t next = p_.token[first_token_ + accepted];
    if (accepted_[1]) {  // block-uniform
      BestKey best{0, ~0u};
      for (uint32_t i = threadIdx.x; i < blocks; i += kVerifyThreads) {
        if (best_of_row[i].value > best.value) best = best_of_row[i];  // chunks ascend
      }
      best = best_of_block(best, of_warp_);
      if (best.value > 0) {
        next = best_of_block(best_token(accepted, best.id), of_warp_ + kVerifyWarps).id;
      }
    }
    for (uint32_t i = threadIdx.x; i <= W_; i += kVerifyThreads) {
      p_.tokens[first_token_ + i] = i < accepted    ? p_.drafts[first_draft_ + i]
                                    : i == accepted ? next
                                                    : -1;
    }
    if (threadIdx.x == 0) p_.accepted[row_] = int32_t(accepted);
  }

 private:
  // The logits row of draft i; -1: none.
  DLM_DEVICE int64_t target_row(uint32_t i) const {
    const int64_t at = first_token_ + i, row = p_.row_map ? p_.row_map[at] : at;
    return row < p_.R ? row : -1;
  }
  DLM_DEVICE int64_t draft_row(uint32_t i) const {
    const int64_t at = first_draft_ + i, row = p_.draft_row_map ? p_.draft_row_map[at] : at;
    return row < p_.Q ? row : -1;
  }
  DLM_DEVICE bool has_ratio(uint32_t i) const {
    return by_ratio_ && target_row(i) >= 0 && draft_row(i) >= 0;
  }
  DLM_DEVICE const T* target(uint32_t i) const {
    return static_cast<const T*>(p_.logits) + target_row(i) * p_.logits_stride;
  }
  DLM_DEVICE const T* draft(uint32_t i) const {
    return static_cast<const T*>(p_.draft_logits) + draft_row(i) * p_.draft_stride;
  }
  DLM_DEVICE bool banned(int64_t id) const {
    bool hit = false;
    for (int64_t k = 0; k < p_.banned_count; ++k) hit |= p_.banned[k] == id;
    return hit;
  }

  DLM_DEVICE void find_failure() const {
    if (warp_index() == 0) accept();
    __syncthreads();
  }
  // Called by the first warp: determines how many drafts are accepted, and whether the next one
  // failed by ratio.
  DLM_DEVICE void accept() const {
    uint32_t accepted = 0;
    bool fails_by_ratio = false;
    for (uint32_t begin = 0; begin < W_ && accepted == begin; begin += 32) {
      const uint32_t i = begin + lane_index();
      const int64_t id = i < W_ ? p_.drafts[first_draft_ + i] : -1;
      const bool ratio = id >= 0 && has_ratio(i);
      const uint32_t passed = __ballot_sync(kAllLanes, id >= 0 && passes(i, id, ratio));
      const uint32_t by_ratio = __ballot_sync(kAllLanes, ratio);
      const uint32_t count = passed == kAllLanes ? 32 : uint32_t(__ffs(int(~passed)) - 1);
      accepted = begin + count;
      fails_by_ratio = count < 32 && (by_ratio >> count & 1);
    }
    if (lane_index() == 0) {
      accepted_[0] = accepted;
      accepted_[1] = fails_by_ratio;
    }
  }

  DLM_DEVICE bool passes(uint32_t i, int64_t id, bool ratio) const {
    if (!ratio) return id == p_.token[first_token_ + i];
    if (id >= p_.V || banned(id)) return false;
    const float p =
        tempered_probability(to_float(target(i)[id]), inverse_, p_.logsumexp[first_token_ + i]);
    const float q = tempered_probability(to_float(draft(i)[id]), inverse_,
                                         p_.draft_logsumexp[first_draft_ + i]);
    const Philox4 bits = philox(seed_, position_ + i, step_, Stream::kVerify, 0);
    return bernoulli(bits.word[0], div_rn(p, mul_rn(p_.leniency, q)));
  }

  // The best of this warp's chunks starting at `first`; each lane computes the key of one of them.
  DLM_DEVICE BestKey best_chunk(uint32_t i, uint32_t first) const {
    const uint32_t own = first + lane_index() * kVerifyWarps + warp_index();
    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t turn = 0; turn < kVerifyTurns; ++turn) {
      const uint32_t chunk = first + turn * kVerifyWarps + warp_index();
      if (chunk * kRaceChunk >= V_) break;
      float rest[8];
      subtract(i, chunk, rest);
      const float total = chunk_sum_over_warp<kTwoRuns>(rest);
      if (lane_index() == turn) sum = total;
    }
    if (!(sum > 0.0f)) return {0, ~0u};
    return {float_to_bits(weight_key(sum, word(Stream::kResidualChunk, i, own))), own};
  }

  // The best token of a chunk, which must contain one.
  DLM_DEVICE BestKey best_token(uint32_t i, uint32_t chunk) const {
    BestKey best{0, ~0u};
#pragma unroll 1
    for (uint32_t at = threadIdx.x; at < kRaceChunk; at += kVerifyThreads) {
      const uint32_t id = chunk * kRaceChunk + at;
      if (id >= V_ || banned(id)) continue;
      const float rest = more(to_float(target(i)[id]), to_float(draft(i)[id]), i);
      if (!(rest > 0.0f)) continue;
      const uint32_t key = float_to_bits(weight_key(rest, word(Stream::kResidual, i, id)));
      if (key > best.value) best = {key, id};  // ids ascend
    }
    return best;
  }

  DLM_DEVICE uint32_t word(Stream stream, uint32_t i, uint32_t index) const {
    return word_of(philox(seed_, position_ + i, step_, stream, index / 4), index);
  }

  // max(p - q, 0)
  DLM_DEVICE float more(float z, float y, uint32_t i) const {
    const float p = tempered_probability(z, inverse_, p_.logsumexp[first_token_ + i]);
    const float q = tempered_probability(y, inverse_, p_.draft_logsumexp[first_draft_ + i]);
    const float rest = add_rn(p, -q);
    return rest > 0.0f ? rest : 0.0f;
  }

  // A lane's part of a chunk: see chunk_sum_over_warp.
  DLM_DEVICE void subtract(uint32_t i, uint32_t chunk, float (&rest)[8]) const {
    constexpr uint32_t n = kPerChunk<T>;
#pragma unroll
    for (uint32_t run = 0; run < 8 / n; ++run) {
      const uint32_t first = chunk * kRaceChunk + run * 128 + lane_index() * n;
      const uint4 z = load_chunk(target(i), first, V_), y = load_chunk(draft(i), first, V_);
      const uint32_t z_words[4] = {z.x, z.y, z.z, z.w}, y_words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (uint32_t j = 0; j < n; ++j) {
        const uint32_t at = j / Word<T>::kElements, index = j % Word<T>::kElements;
        rest[run * n + j] =
            more(Word<T>::value(z_words[at], index), Word<T>::value(y_words[at], index), i);
      }
      for (int64_t k = 0; k < p_.banned_count; ++k) {
#pragma unroll
        for (uint32_t j = 0; j < n; ++j) {
          if (p_.banned[k] == int64_t(first) + j) rest[run * n + j] = 0.0f;
        }
      }
    }
  }

  static DLM_DEVICE BestKey best_of_warp(BestKey b) {
    const uint32_t value = __reduce_max_sync(kAllLanes, b.value);
    return {value, __reduce_min_sync(kAllLanes, b.value == value ? b.id : ~0u)};
  }
  static DLM_DEVICE BestKey best_of_block(BestKey b, BestKey* of_warp) {
    b = best_of_warp(b);
    if (lane_index() == 0) of_warp[warp_index()] = b;
    __syncthreads();
    return best_of_warp(lane_index() < kVerifyWarps ? of_warp[lane_index()] : BestKey{0, ~0u});
  }

  const VerifyDraftsParams& p_;
  const uint32_t row_, V_, W_;
  const int64_t first_draft_, first_token_;  // where the row starts in [B,W] and [B,W+1]
  uint32_t* const accepted_;
  BestKey* const of_warp_;  // of the chunks, then of the tokens
  bool by_ratio_;
  float inverse_ = 1.0f;
  uint64_t seed_ = 0;
  uint32_t step_ = 0, position_ = 0;
};

// Number of blocks that share a row's chunks; depends only on the vocabulary.
inline uint32_t blocks_of_row(const VerifyDraftsParams& p) {
  constexpr int64_t kLogits = int64_t(kVerifyChunks) * kRaceChunk;
  return p.draft_logits ? uint32_t((p.V + kLogits - 1) / kLogits) : 0;
}

struct VerifyLaunch {
  VerifyDraftsParams p;
  BestKey* best;    // [B, blocks]
  uint32_t blocks;  // per row
};

template <class T>
__global__ void __launch_bounds__(kVerifyThreads, 4)
    race_chunks_kernel(const __grid_constant__ VerifyLaunch job) {
  SmemCarver smem;
  const uint32_t row = blockIdx.x / job.blocks, block = blockIdx.x - row * job.blocks;
  VerifyRow<T>(job.p, row, smem).race_chunks(block, job.best + int64_t(row) * job.blocks);
}

template <class T>
__global__ void __launch_bounds__(kVerifyThreads, 4)
    verify_drafts_kernel(const __grid_constant__ VerifyLaunch job) {
  SmemCarver smem;
  VerifyRow<T>(job.p, blockIdx.x, smem)
      .finish(job.blocks, job.best + int64_t(blockIdx.x) * job.blocks);
}

inline int64_t verify_workspace(const VerifyDraftsParams& p) {
  return p.B * blocks_of_row(p) * int64_t(sizeof(BestKey));
}

inline const char* why_not_verify_drafts(const VerifyDraftsParams& p) {
  if (p.W > 0x7fff0000) return "drafts must have fewer columns";
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  if (p.B * std::max<int64_t>(blocks_of_row(p), 1) > 0x7fffffff) {
    return "drafts must have fewer rows";
  }
  return nullptr;
}

// `workspace` has verify_workspace(p) bytes.
inline cudaError_t start_verify_drafts(const VerifyDraftsParams& p, void* workspace,
                                       cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  const VerifyLaunch job{p, static_cast<BestKey*>(workspace), blocks_of_row(p)};
  const auto start = [&](auto type) {
    using T = decltype(type);
    const auto launched = [&](auto kernel, uint32_t blocks) {
      return launch(kernel, dim3(blocks), dim3(kVerifyThreads), VerifyRow<T>::smem().bytes, stream,
                    job);
    };
    if (job.blocks > 0) {
      const cudaError_t error = launched(race_chunks_kernel<T>, uint32_t(p.B) * job.blocks);
      if (error != cudaSuccess) return error;
    }
    return launched(verify_drafts_kernel<T>, uint32_t(p.B));
  };
  if (p.dtype == DType::kFloat32) return start(float{});
  if (p.dtype == DType::kFloat16) return start(Float16{});
  return start(BFloat16{});
}

}  // namespace dlm::cuda
