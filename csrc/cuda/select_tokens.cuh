// SPDX-License-Identifier: Apache-2.0
// Selects the slots of a window to commit:
//   E = eligible slots whose score is a number above -inf
//   P = the slots of E that pass gate and rule
//   selected = the best `cap` of P if |P| >= min(need, |E|), else the best `fill` of E
// A block processes a row; thread t reads slots t, t + threads, ... and keeps their 64-bit keys
// (common/order.h) in registers. "The best k" are those whose key is at most the k-th smallest, so
// nothing is scattered; keys are sorted only for rules over prefixes and where a limit applies.
// Sums are of integers, so their order does not matter: the results equal the CPU's, bit for bit.
// Reads 5 to 10 bytes per slot. Latency is the limit, that of one launch for the usual window of
// 32. Needs sm_80.
#pragma once
#include <cmath>

#include "common/exact.h"
#include "common/fixed_point.h"
#include "common/order.h"
#include "common/philox.h"
#include "cuda/select_tokens.h"
#include "cuda/sort.cuh"

namespace dlm::cuda {

// One key per thread while each of an SM's four schedulers has at most two warps; then four, which
// lets more steps of the sort run within a thread. Eight would spill registers.
struct SlotBlock {
  int64_t slots;
  uint32_t threads;
  int keys;
};
constexpr SlotBlock kSlotBlocks[] = {{32, 32, 1},    {64, 64, 1},    {128, 128, 1},
                                     {256, 256, 1},  {512, 128, 4},  {1024, 256, 4},
                                     {2048, 512, 4}, {4096, 1024, 4}};

// Sum and maximum of the costs up to some rank. Sums only wrap beyond 2048 maximal costs, long
// after the first excess.
struct Costs {
  uint64_t sum, largest;
};
DLM_DEVICE Costs joined(Costs a, Costs b) {
  return {a.sum + b.sum, a.largest > b.largest ? a.largest : b.largest};
}

template <int kKeys>
class SelectRow {
  static constexpr uint64_t kNoKey = ~uint64_t(0);  // no number has it: its upper half is a NaN's

 public:
  static constexpr SmemSize smem(uint32_t threads) {
    return SmemSize{}
        .take<uint64_t>(threads * kKeys)
        .take<uint32_t>(2 * kMaxWarps)
        .take<Costs>(kMaxWarps)
        .template take<uint64_t>(1);
  }

  DLM_DEVICE SelectRow(const SelectTokensParams& p, SmemCarver& smem)
      : p_(p),
        row_(blockIdx.x),
        offset_(int64_t(blockIdx.x) * p.W),
        exchange_(smem.take<uint64_t>(blockDim.x * kKeys)),
        partial_(smem.take<uint32_t>(2 * kMaxWarps)),
        totals_(smem.take<Costs>(kMaxWarps)),
        limit_(smem.take<uint64_t>(1)),
        parameter_(row_value(p.parameter, row_, 0.0f)),
        seed_(uint64_t(row_value(p.random.seed, row_, int64_t(0)))),
        step_(uint32_t(row_value(p.random.step, row_, 0))) {}

  DLM_DEVICE void run() {
    const int32_t need = row_value(p_.need, row_, 0), fill = row_value(p_.fill, row_, 0);
    const int32_t cap = row_value(p_.cap, row_, int32_t(kMaxSlots));
    const bool by_prefix =
        p_.rule == Rule::kFactor || p_.rule == Rule::kEntropyBound || p_.rule == Rule::kEntropySum;
    read_slots();

    // Both counts are at most kMaxSlots.
    const uint32_t counts =
        block_reduce<Sum>(uint32_t(__popc(inside_)) | uint32_t(__popc(in_e_)) << 16, partial_);
    const int32_t inside = int32_t(counts & 0xffff), all = int32_t(counts >> 16);

    if (by_prefix) sort(inside_);
    const int32_t passed = by_prefix ? prefix_length(inside) : inside;
    const bool falls_back = p_.rule == Rule::kNone || passed < min(need, all);
    const int32_t available = falls_back ? all : passed;
    const int32_t best = max(0, min(falls_back ? fill : cap, available));

    uint64_t limit = best > 0 ? kNoKey : 0;
    if (best > 0 && (best < available || (by_prefix && !falls_back))) {
      const bool sorted = by_prefix && (!falls_back || inside == all);
      if (!sorted) sort(falls_back ? in_e_ : inside_);
      limit = key_of_rank(best - 1);
    }
    const uint32_t members = falls_back ? in_e_ : inside_;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t w = slot(k);
      if (w < p_.W) {
        p_.selected[offset_ + w] = (members >> k & 1) && key(k) <= limit;
      }
    }
    if (threadIdx.x == 0) p_.count[row_] = best;
  }

 private:
  DLM_DEVICE uint32_t slot(int k) const { return threadIdx.x + uint32_t(k) * blockDim.x; }
  DLM_DEVICE static uint32_t slot_of(uint64_t key) { return uint32_t(key); }
  DLM_DEVICE uint64_t key(int k) const { return uint64_t(order_[k]) << 32 | slot(k); }

  DLM_DEVICE uint32_t bits(Stream stream, uint32_t w) const {
    return philox(seed_, uint32_t(p_.random.position[offset_ + w]), step_, stream, 0).word[0];
  }
  DLM_DEVICE bool reaches(float score, float level) const {
    return p_.strict ? score > level : score >= level;
  }

  // Sets in_e_ and inside_, a bit for each slot of this thread: whether it is in E; and whether it
  // is in E, passes the gate and, if the rule considers one slot at a time, the rule (then it is in
  // P). Sets order_: upper halves of the keys.
  DLM_DEVICE void read_slots() {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      order_[k] = 0;
      const uint32_t w = slot(k);
      if (w >= p_.W) continue;
      const float score = p_.score[offset_ + w];
      const bool gate = p_.gate ? p_.gate[offset_ + w] != 0 : true;
      const bool member = (p_.eligible[offset_ + w] != 0) & (score > -INFINITY);  // false for NaN
      const bool passes =
          p_.rule == Rule::kThreshold ? reaches(score, parameter_) : p_.rule != Rule::kNone;
      order_[k] = uint32_t(descending_key(score, 0) >> 32);
      in_e_ |= uint32_t(member) << k;
      inside_ |= uint32_t(member & gate & passes) << k;
    }
    const float temperature = row_value(p_.order_temperature, row_, 0.0f);
    if (temperature > 0.0f) perturb(div_rn(1.0f, temperature));
    if (p_.rule == Rule::kBernoulli) toss();
  }

  // Loops over draws are not unrolled: they would exceed the registers and the instruction cache.
  DLM_DEVICE void perturb(float inverse) {
#pragma unroll 1
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t w = slot(k);
      if (!(in_e_ >> k & 1)) continue;
      float value = mul_add_rn(p_.score[offset_ + w], inverse, gumbel(bits(Stream::kOrder, w)));
      if (value != value) value = -INFINITY;
      exchange_[w] = descending_key(value, 0);
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (in_e_ >> k & 1) order_[k] = uint32_t(exchange_[slot(k)] >> 32);
    }
  }

  DLM_DEVICE void toss() {
#pragma unroll 1
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t w = slot(k);
      if (!(inside_ >> k & 1)) continue;
      const bool heads = bernoulli(bits(Stream::kBernoulli, w), p_.cost[offset_ + w]);
      inside_ &= ~(uint32_t(!heads) << k);
    }
  }

  // Sets sorted_: the keys of these slots, in order.
  DLM_DEVICE void sort(uint32_t members) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) sorted_[k] = members >> k & 1 ? key(k) : kNoKey;
    block_sort<kKeys>(sorted_, exchange_);
  }

  // Returns how many of the first n sorted slots pass the rule: those before the first that fails.
  DLM_DEVICE int32_t prefix_length(int32_t n) const {
    const uint32_t count = uint32_t(n), rank = threadIdx.x * kKeys;
    uint32_t first = count;
    if (p_.rule == Rule::kFactor) {
#pragma unroll
      for (uint32_t k = kKeys; k-- > 0;) {
        const uint32_t i = rank + k;
        if (i == 0 || i >= count) continue;
        const float level = add_rn(1.0f, -div_rn(parameter_, float(i + 2)));
        if (!reaches(p_.score[offset_ + slot_of(sorted_[k])], level)) first = i;
      }
    } else {
      // Read twice rather than kept: registers are scarce.
      const auto cost = [&](uint32_t k) -> Costs {
        if (rank + k >= count) return {0, 0};
        const float given = p_.cost[offset_ + slot_of(sorted_[k])];
        const uint64_t units = uint64_t(fixed_point(given, kMaxCost));
        return {units, units};
      };
      Costs mine{0, 0};
#pragma unroll
      for (uint32_t k = 0; k < kKeys; ++k) mine = joined(mine, cost(k));
      Costs before = costs_before(mine);
      const int64_t budget = fixed_point(parameter_, 0.0f);
#pragma unroll
      for (uint32_t k = 0; k < kKeys; ++k) {
        before = joined(before, cost(k));
        const int64_t sum = int64_t(before.sum), rest = int64_t(before.sum - before.largest);
        const bool fails = p_.rule == Rule::kEntropyBound ? rest > budget : sum >= budget;
        if (fails) first = min(first, rank + k);
      }
    }
    return int32_t(block_reduce<Least>(first, partial_ + kMaxWarps));
  }

  // Returns the combined costs of all threads before this one.
  DLM_DEVICE Costs costs_before(Costs mine) const {
    const uint32_t lane = lane_index(), warp = warp_index();
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const Costs other{__shfl_up_sync(kAllLanes, mine.sum, distance),
                        __shfl_up_sync(kAllLanes, mine.largest, distance)};
      if (lane >= distance) mine = joined(other, mine);
    }
    if (lane == 31) totals_[warp] = mine;
    Costs before{__shfl_up_sync(kAllLanes, mine.sum, 1),
                 __shfl_up_sync(kAllLanes, mine.largest, 1)};
    if (lane == 0) before = {0, 0};
    __syncthreads();
    for (uint32_t i = 0; i < warp; ++i) before = joined(totals_[i], before);
    return before;
  }

  DLM_DEVICE uint64_t key_of_rank(int32_t rank) const {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (int32_t(threadIdx.x) * kKeys + k == rank) *limit_ = sorted_[k];
    }
    __syncthreads();
    return *limit_;
  }

  const SelectTokensParams& p_;
  const uint32_t row_;
  const int64_t offset_;
  uint64_t* const exchange_;
  uint32_t* const partial_;
  Costs* const totals_;
  uint64_t* const limit_;
  const float parameter_;
  const uint64_t seed_;
  const uint32_t step_;
  uint32_t order_[kKeys], in_e_ = 0, inside_ = 0;
  uint64_t sorted_[kKeys];
};

template <int kKeys>
__global__ void __launch_bounds__(kKeys == 1 ? 256 : 1024)
    select_tokens_kernel(const __grid_constant__ SelectTokensParams p) {
  SmemCarver smem;
  SelectRow<kKeys>(p, smem).run();
}

inline const char* why_not_select_tokens(const SelectTokensParams& p) {
  return p.B > 0x7fffffff ? "score must have fewer than 2^31 rows" : nullptr;
}

inline cudaError_t start_select_tokens(const SelectTokensParams& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  const SlotBlock* block = kSlotBlocks;
  while (block->slots < p.W) ++block;  // W <= kMaxSlots
  const dim3 grid(uint32_t(p.B)), threads(block -> threads);
  if (block->keys == 1) {
    return launch(select_tokens_kernel<1>, grid, threads, SelectRow<1>::smem(block->threads).bytes,
                  stream, p);
  }
  return launch(select_tokens_kernel<4>, grid, threads, SelectRow<4>::smem(block->threads).bytes,
                stream, p);
}

}  // namespace dlm::cuda
