// SPDX-License-Identifier: Apache-2.0
// The floor of a filtered row: the lowest logit that top-k and top-p keep. Both keep whatever is at
// or above some value, the largest such that it and all above measure more than a limit: logits are
// counted for top-k, their probabilities added up for top-p. A block takes a row and finds the
// value by a radix search over its bits, three passes over the row (from L2), without a sort: a
// pass fills 2048 bins in shared memory. Probabilities are integers there (as many bits behind the
// point as their sum leaves room for), so that sums are exact in any order.
// V elements a pass, three or six passes, from L2: one SM's arithmetic is the limit.
#pragma once
#include "common/math.h"
#include "common/order.h"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

// What a scan finds in a tile of a row. argmax and chunk: 2^32 - 1 where there is none.
struct alignas(16) TilePart {
  float max, second, weight, exponent;  // weight and exponent leave out the argmax
  uint32_t argmax, flags;
  uint32_t key, chunk;  // ordered bits of the largest key of a chunk; the chunk
};

struct ConfidenceLaunch {
  TokenConfidenceParams p;
  TilePart* parts;  // [N, tiles]
  float* floor;     // [N]
  uint32_t tiles;
  bool refining;  // the second scan, of filtered rows
};

constexpr uint32_t kFilterThreads = 512, kFilterWarps = kFilterThreads / 32, kBins = 2048;

template <class T>
class RowFilter {
  // Of the search: the bin that crosses the limit, and what lies above it.
  struct Crossing {
    uint64_t above, total;
    uint32_t bin;
  };

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<unsigned long long>(kBins)
        .template take<uint64_t>(kFilterWarps)
        .template take<Crossing>(1);
  }
  DLM_DEVICE RowFilter(const ConfidenceLaunch& job, SmemCarver& smem)
      : job_(job),
        bins_(smem.take<unsigned long long>(kBins)),
        of_warp_(smem.take<uint64_t>(kFilterWarps)),
        crossing_(smem.take<Crossing>(1)),
        plan_(job.p, blockIdx.x) {}

  DLM_DEVICE void run() {
    if (!plan_.used() || !plan_.filters) return;  // the whole block
    const LogitsRow<T> row(job_.p, blockIdx.x, plan_.source);
    uint32_t top = 0;
    for (uint32_t i = lane_index(); i < job_.tiles; i += 32)
      top = max(top, ordered_bits(job_.parts[int64_t(blockIdx.x) * job_.tiles + i].max));
    max_ = ordered_value(__reduce_max_sync(kAllLanes, top));
    float floor = -INFINITY;
    if (max_ > -INFINITY) {
      float by_count = -INFINITY, by_mass = -INFINITY;
      if (plan_.k > 0 && plan_.k < job_.p.V) {
        const uint32_t kth = search(row, false);
        if (kth) by_count = ordered_value(kth);
      }
      if (plan_.top_p < 1.0f) {
        if (!job_.p.top_p_first) lowest_ = by_count;  // the mass of what top-k left
        const uint32_t crossed = search(row, true);
        if (crossed) {
          by_mass = job_.p.keep_crossing ? ordered_value(crossed)
                                         : fminf(ordered_value(crossed + 1), max_);
        }
      }
      floor = fmaxf(by_count, by_mass);
    }
    if (threadIdx.x == 0) job_.floor[blockIdx.x] = floor;
  }

 private:
  // As ordered bits; 0: there is none.
  DLM_DEVICE uint32_t search(const LogitsRow<T>& row, bool mass) {
    uint64_t above = 0, limit = uint64_t(plan_.k - 1);
    uint32_t prefix = 0;
#pragma unroll 1
    for (uint32_t level = 0; level < 3; ++level) {
      const uint32_t shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level < 2 ? 11 : 10;
      for (uint32_t b = threadIdx.x; b < kBins; b += kFilterThreads) bins_[b] = 0;
      __syncthreads();
      fill(row, mass, shift, prefix << bits, 1u << bits);
      __syncthreads();
      find(mass && level == 0, above, limit);
      const Crossing found = *crossing_;
      if (found.bin == kBins) return 0;
      if (mass && level == 0) limit = share_of(found.total);
      above = found.above;
      prefix = prefix << bits | found.bin;
    }
    return prefix;
  }
  DLM_DEVICE uint64_t share_of(uint64_t total) const {
    return uint64_t(fmax(double(plan_.top_p) * double(total), 0.0));
  }

  // `base` is this level's number of the first bin.
  DLM_DEVICE void fill(const LogitsRow<T>& row, bool mass, uint32_t shift, uint32_t base,
                       uint32_t size) const {
    constexpr uint32_t n = kPerChunk<T>;
    // A sum of V probabilities stays below 2^62.
    const float unit = bits_to_float(uint32_t(127 + 30 + __clz(int(row.V))) << 23);
#pragma unroll 1
    for (uint32_t first = threadIdx.x * n; first < row.V; first += kFilterThreads * n) {
      float z[n];
      uint32_t flags = 0;
      row.values(first, z, flags);
      const uint32_t allowed = row.allowed(first);
      row.each_banned(first, n, [&](uint32_t offset) {
#pragma unroll
        for (uint32_t j = 0; j < n; ++j) {
          if (j == offset) z[j] = -INFINITY;
        }
      });
#pragma unroll
      for (uint32_t j = 0; j < n; ++j) {
        const uint32_t bin = (ordered_bits(z[j]) >> shift) - base;
        if (!(allowed >> j & 1) || !(z[j] > -INFINITY) || z[j] < lowest_ || bin >= size) continue;
        uint64_t measure = 1;
        if (mass) {
          const float x = mul_rn(add_rn(z[j], -max_), plan_.inverse);
          measure = uint64_t(mul_rn(exp_normal(x), unit));
        }
        if (measure) atomicAdd(&bins_[bin], static_cast<unsigned long long>(measure));
      }
    }
  }

  // The highest bin at which what lies at and above it exceeds the limit; with `share`, the limit
  // is a share of the total. kBins: there is none.
  DLM_DEVICE void find(bool share, uint64_t above, uint64_t limit) const {
    constexpr uint32_t each = kBins / kFilterThreads;
    const uint32_t lane = lane_index(), highest = kBins - 1 - threadIdx.x * each;
    uint64_t mine = 0;
#pragma unroll
    for (uint32_t i = 0; i < each; ++i) mine += bins_[highest - i];
    uint64_t upto = mine;  // of this warp's threads up to this one
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, upto, distance);
      if (lane >= distance) upto += other;
    }
    if (lane == 31) of_warp_[warp_index()] = upto;
    if (threadIdx.x == 0) crossing_->bin = kBins;
    __syncthreads();
    uint64_t total = 0, before = above + upto - mine;
    for (uint32_t w = 0; w < kFilterWarps; ++w) {
      if (w < warp_index()) before += of_warp_[w];
      total += of_warp_[w];
    }
    if (share) limit = share_of(total);
#pragma unroll
    for (uint32_t i = 0; i < each; ++i) {
      const uint64_t next = before + bins_[highest - i];
      if (before <= limit && limit < next) *crossing_ = {before, total, highest - i};
      before = next;
    }
    __syncthreads();
  }

  const ConfidenceLaunch& job_;
  unsigned long long* const bins_;
  uint64_t* const of_warp_;
  Crossing* const crossing_;
  const RowPlan plan_;
  float max_ = -INFINITY, lowest_ = -INFINITY;
};

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    find_floors_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  RowFilter<T>(job, smem).run();
}

}  // namespace dlm::cuda
