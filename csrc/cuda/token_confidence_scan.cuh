// SPDX-License-Identifier: Apache-2.0
// Summarizes a row of logits chunk by chunk (common/race.h: 256 logits): its largest logit and,
// relative to it, the sums
//   weight = sum of e^x, exponent = sum of x e^x / ln 2, x = (z - largest) * scale
// A warp processes a chunk, a lane eight of its logits; four chunks share the reductions over
// lanes. Uses neither shared memory nor barriers: the loads of many warps hide each other's
// latency. Reads V elements and writes 3 % of that. A chunk's bits depend on nothing outside it.
#pragma once
#include "common/race.h"
#include "cuda/chunk_sum.cuh"
#include "cuda/token_confidence_filter.cuh"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

constexpr uint32_t kScanThreads = 256, kScanWarps = kScanThreads / 32;
constexpr uint32_t kTogether = 4;                           // of a warp's kWarpChunks chunks
constexpr uint32_t kScanChunks = kScanWarps * kWarpChunks;  // per block

template <class T, bool adjusted>
class ChunkScan {
  using Row = LogitsRow<T>;

 public:
  DLM_DEVICE explicit ChunkScan(const ConfidenceLaunch& job)
      : job_(job),
        blocks_((job.chunks + kScanChunks - 1) / kScanChunks),
        n_(job.first + blockIdx.x / blocks_),
        block_(blockIdx.x % blocks_),
        plan_(job.p, n_),
        sums_(job.sums_of(n_)),
        scale_((job.p.distribution == Distribution::kRaw ? 1.0f : plan_.inverse) * 1.44269504f) {}

  DLM_DEVICE void run() {
    if (!plan_.used() || (job_.refining && !plan_.filters)) return;  // block-uniform
    if (plan_.filters && !job_.refining) clear_search(job_.searches[n_], block_, blocks_);
    const Row row(job_.p, n_, plan_.source);
    const uint32_t first = block_ * kScanChunks + warp_index() * kWarpChunks;
    if (first >= job_.chunks) return;
    const bool simple =
        !adjusted && !job_.refining && row.is_simple(job_.first_chunk + first, kWarpChunks);
    uint32_t flags = 0;
#pragma unroll 1
    for (uint32_t c = first; c < first + kWarpChunks; c += kTogether) {
      Described own;
      if (!(simple && describe_simple(row, c, own))) own = describe(row, c, flags);
      __syncwarp();  // all lanes have seen what the first scan stored
      write(c + lane_index() / 8, own);
    }
    flags = __reduce_or_sync(kAllLanes, flags);
    if (lane_index() == 0 && !job_.refining) sums_.flags[first / kWarpChunks] = flags;
  }

 private:
  // Of kTogether chunks, the one that belongs to this lane.
  struct Described {
    float largest = -INFINITY, weight = 0.0f, exponent = 0.0f;
  };

  // Chunks in which only NaN and +inf need attention; returns false if there are any.
  DLM_DEVICE bool describe_simple(const Row& row, uint32_t first, Described& own) const {
    uint4 raw[kTogether][Row::kRuns];
#pragma unroll
    for (uint32_t c = 0; c < kTogether; ++c) row.load_simple(job_.first_chunk + first + c, raw[c]);
    float top[kTogether];
    bool ordinary = true;
#pragma unroll
    for (uint32_t c = 0; c < kTogether; ++c) {
      top[c] = Row::largest_of(raw[c]);
      ordinary &= top[c] <= kLargestFloat;
    }
    if (!__all_sync(kAllLanes, ordinary)) return false;
    float weight[kTogether], exponent[kTogether];
#pragma unroll
    for (uint32_t c = 0; c < kTogether; ++c) {
      float z[8];
      Row::unpack(raw[c], z);
      const float largest = over_warp(top[c]);
      own.largest = lane_index() / 8 == c ? largest : own.largest;
      add_up(z, largest, weight[c], exponent[c]);
    }
    own.weight = sum_of_four(weight);
    own.exponent = sum_of_four(exponent);
    return true;
  }

  // The same for any chunks, one by one, with the same order of sums.
  DLM_DEVICE Described describe(const Row& row, uint32_t first, uint32_t& flags) const {
    const float floor = job_.refining ? job_.floor(n_) : -INFINITY;
    Described own;
#pragma unroll 1
    for (uint32_t c = 0; c < kTogether && first + c < job_.chunks; ++c) {
      if (job_.refining && sums_.largest[first + c] < floor) continue;  // warp-uniform
      float z[8], top = -INFINITY;
      row.effective(job_.first_chunk + first + c, z, flags);
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        z[j] = z[j] >= floor ? z[j] : -INFINITY;
        top = fmaxf(top, z[j]);
      }
      Described of_chunk;
      of_chunk.largest = over_warp(top);
      add_up(z, of_chunk.largest, of_chunk.weight, of_chunk.exponent);
      of_chunk.weight = sum_over_warp(of_chunk.weight);
      of_chunk.exponent = sum_over_warp(of_chunk.exponent);
      if (lane_index() / 8 == c) own = of_chunk;
    }
    return own;
  }

  DLM_DEVICE void write(uint32_t chunk, const Described& own) const {
    if (lane_index() % 8 != 0 || chunk >= job_.chunks) return;
    sums_.largest[chunk] = own.largest;
    sums_.weight[chunk] = own.weight;
    sums_.exponent[chunk] = own.exponent;
  }

  static DLM_DEVICE float over_warp(float x) {
    return ordered_value(__reduce_max_sync(kAllLanes, ordered_bits(x)));
  }

  // In a chunk without any logits, whose largest is -inf, nothing has weight.
  DLM_DEVICE void add_up(const float (&z)[8], float top, float& weight, float& exponent) const {
    const float base = top > -INFINITY ? top : 0.0f;
    weight = exponent = 0.0f;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      // The difference is taken first, because a product could overflow. 2^-127 counts as zero, so
      // -inf has no weight in either sum.
      const float x = fmaxf((z[j] - base) * scale_, -127.0f);
      const float w = ptx::exp2_approx(x);
      weight += w;
      exponent = __fmaf_rn(x, w, exponent);
    }
  }

  static DLM_DEVICE float sum_over_warp(float x) {
#pragma unroll
    for (uint32_t bit = 16; bit; bit /= 2) x = add_across(x, bit);
    return x;
  }

  // Reduces over the warp, with four values per lane: lanes 8 i ... 8 i + 7 receive the sum of the
  // i-th. Each lane of a pair keeps half of the values, and receives the other lane's part of
  // these.
  static DLM_DEVICE float sum_of_four(const float (&x)[kTogether]) {
    static_assert(kTogether == 4);
    const bool later = lane_index() & 16, odd = lane_index() & 8;
    const float even = exchange(x[0], x[2], later, 16), uneven = exchange(x[1], x[3], later, 16);
    const float sum = exchange(even, uneven, odd, 8);
    return add_across(add_across(add_across(sum, 4), 2), 1);
  }
  static DLM_DEVICE float exchange(float first, float second, bool keep_second, uint32_t bit) {
    const float other = __shfl_xor_sync(kAllLanes, keep_second ? first : second, int(bit));
    return add_rn(keep_second ? second : first, other);
  }

  const ConfidenceLaunch& job_;
  const uint32_t blocks_, n_, block_;
  const RowPlan plan_;
  const ChunkArrays sums_;
  const float scale_;
};

template <class T, bool adjusted>
__global__ void __launch_bounds__(kScanThreads, 4)
    scan_chunks_kernel(const __grid_constant__ ConfidenceLaunch job) {
  ChunkScan<T, adjusted>(job).run();
}

}  // namespace dlm::cuda
