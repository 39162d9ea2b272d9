// SPDX-License-Identifier: Apache-2.0
// Accepts a prefix of each row's drafts and finds the token after it: see
// cpu/verify_drafts_generic.cpp for the formulas. A block takes a row of the batch. Its first warp
// tests the drafts, one a lane, from single logits; if one fails by ratio, all warps read that
// draft's two rows of logits, a chunk each in turn, and race max(p - q, 0) (common/race.h). All
// arithmetic is the CPU's, bit for bit. Bytes: two rows of logits, where a draft is rejected; one
// SM's arithmetic is the limit, some 40 operations a logit. Needs sm_80.
#pragma once
#include "common/race.h"
#include "cuda/chunk_sum.cuh"
#include "cuda/token_confidence_row.cuh"
#include "cuda/verify_drafts.h"

namespace dlm::cuda {

constexpr uint32_t kVerifyThreads = 512, kVerifyWarps = kVerifyThreads / 32;

template <class T>
class VerifyRow {
  static constexpr bool kTwoRuns = kPerChunk<T> == 4;
  // Of keys of chunks, or of tokens.
  struct Best {
    uint32_t value, id;  // bits of a float that is not negative
  };

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}.take<uint32_t>(2).template take<Best>(2 * kVerifyWarps);
  }

  DLM_DEVICE VerifyRow(const VerifyDraftsParams& p, SmemCarver& smem)
      : p_(p),
        row_(blockIdx.x),
        V_(uint32_t(p.V)),
        W_(uint32_t(p.W)),
        first_draft_(int64_t(row_) * p.W),
        first_token_(int64_t(row_) * (p.W + 1)),
        accepted_(smem.take<uint32_t>(2)),
        of_warp_(smem.take<Best>(2 * kVerifyWarps)) {
    const float temperature = row_value(p.temperature, row_, 0.0f);
    by_ratio_ = p.draft_logits && temperature > 0.0f;
    if (!by_ratio_) return;
    inverse_ = div_rn(1.0f, temperature);
    seed_ = uint64_t(row_value(p.random.seed, row_, int64_t(0)));
    step_ = uint32_t(row_value(p.random.step, row_, 0));
    position_ = uint32_t(p.random.position[row_]);
  }

  DLM_DEVICE void run() {
    if (warp_index() == 0) accept();
    __syncthreads();
    const uint32_t accepted = accepted_[0];
    int64_t next = p_.token[first_token_ + accepted];
    if (accepted_[1]) {  // the whole block
      const Best drawn = draw_rest(accepted);
      if (drawn.value > 0) next = drawn.id;
    }
    for (uint32_t i = threadIdx.x; i <= W_; i += kVerifyThreads) {
      p_.tokens[first_token_ + i] = i < accepted    ? p_.drafts[first_draft_ + i]
                                    : i == accepted ? next
                                                    : -1;
    }
    if (threadIdx.x == 0) p_.accepted[row_] = int32_t(accepted);
  }

 private:
  // Rows of logits of draft i; -1: none.
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

  // By the first warp: how many drafts are accepted, and whether the next one failed by ratio.
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

  // A value of 0 where p exceeds q nowhere.
  DLM_DEVICE Best draw_rest(uint32_t i) const {
    const uint32_t chunks = (V_ + kRaceChunk - 1) / kRaceChunk;
    Best best{0, ~0u};
    float sum = 0.0f;    // of the chunk that is this lane's
    uint32_t turns = 0;  // that this warp has summed since it made keys
#pragma unroll 1
    for (uint32_t chunk = warp_index(); chunk < chunks; chunk += kVerifyWarps) {
      float rest[8];
      subtract(i, chunk, rest);
      const float total = chunk_sum_over_warp<kTwoRuns>(rest);
      if (lane_index() == turns) sum = total;
      if (++turns < 32 && chunk + kVerifyWarps < chunks) continue;
      const uint32_t own = chunk - (turns - 1 - lane_index()) * kVerifyWarps;
      if (lane_index() < turns) {
        const uint32_t key = float_to_bits(weight_key(sum, word(Stream::kResidualChunk, i, own)));
        if (key > best.value) best = {key, own};  // chunks ascend within a lane
      }
      turns = 0;
    }
    best = best_of_block(best, of_warp_);
    if (best.value == 0) return best;  // the whole block
    return best_of_block(draw_token(i, best.id), of_warp_ + kVerifyWarps);
  }

  // Of the winning chunk, by its first threads.
  DLM_DEVICE Best draw_token(uint32_t i, uint32_t chunk) const {
    const uint32_t id = chunk * kRaceChunk + threadIdx.x;
    if (threadIdx.x >= kRaceChunk || id >= V_) return {0, ~0u};
    const float rest = more(to_float(target(i)[id]), to_float(draft(i)[id]), i);
    if (!(rest > 0.0f) || banned(id)) return {0, ~0u};
    return {float_to_bits(weight_key(rest, word(Stream::kResidual, i, id))), id};
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

  static DLM_DEVICE Best best_of_warp(Best b) {
    const uint32_t value = __reduce_max_sync(kAllLanes, b.value);
    return {value, __reduce_min_sync(kAllLanes, b.value == value ? b.id : ~0u)};
  }
  static DLM_DEVICE Best best_of_block(Best b, Best* of_warp) {
    b = best_of_warp(b);
    if (lane_index() == 0) of_warp[warp_index()] = b;
    __syncthreads();
    return best_of_warp(lane_index() < kVerifyWarps ? of_warp[lane_index()] : Best{0, ~0u});
  }

  const VerifyDraftsParams& p_;
  const uint32_t row_, V_, W_;
  const int64_t first_draft_, first_token_;  // where the row starts in [B,W] and [B,W+1]
  uint32_t* const accepted_;
  Best* const of_warp_;  // of the chunks, then of the tokens
  bool by_ratio_;
  float inverse_ = 1.0f;
  uint64_t seed_ = 0;
  uint32_t step_ = 0, position_ = 0;
};

template <class T>
__global__ void __launch_bounds__(kVerifyThreads)
    verify_drafts_kernel(const __grid_constant__ VerifyDraftsParams p) {
  SmemCarver smem;
  VerifyRow<T>(p, smem).run();
}

inline const char* why_not_verify_drafts(const VerifyDraftsParams& p) {
  if (p.B > 0x7fffffff) return "drafts must have fewer than 2^31 rows";
  if (p.W > 0x7fff0000) return "drafts must have fewer columns";
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  return nullptr;
}

inline cudaError_t start_verify_drafts(const VerifyDraftsParams& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  const auto start = [&](auto type) {
    using T = decltype(type);
    return launch(verify_drafts_kernel<T>, dim3(uint32_t(p.B)), dim3(kVerifyThreads),
                  VerifyRow<T>::smem().bytes, stream, p);
  };
  if (p.dtype == DType::kFloat32) return start(float{});
  if (p.dtype == DType::kFloat16) return start(Float16{});
  return start(BFloat16{});
}

}  // namespace dlm::cuda
