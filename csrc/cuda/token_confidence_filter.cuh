// SPDX-License-Identifier: Apache-2.0
// The floor of a filtered row: the lowest logit that top-k and top-p keep. Both keep everything at
// or above some value, which is the largest one such that the measure of all logits at or above it
// exceeds a limit; top-k counts logits, top-p adds up their masses (common/mass.h). The value is
// found by a radix search over its bits, without sorting, in three launches: each block fills 2048
// bins in shared memory from a part of the row, and adds them to the row's bins in global memory;
// the last block to finish finds the bin that crosses the limit. A bin's 64-bit sum is stored in
// two words: most additions are a single 32-bit atomic, which shared memory supports natively,
// while 64 bits would need a compare-exchange loop. Reads V elements in the first of the three
// or six launches, from L2, then those that may still count.
#pragma once
#include "common/mass.h"
#include "common/order.h"
#include "common/race.h"
#include "cuda/token_confidence_row.cuh"

namespace dlm::cuda {

enum class Filter : uint32_t { kCount, kMass };
constexpr uint32_t kWarpChunks = 8;  // chunks that a warp of the scan summarizes and flags together
constexpr uint32_t kFilterThreads = 512, kFilterWarps = kFilterThreads / 32, kBins = 2048;
constexpr uint32_t kFilterChunks = 64;  // per block

// A row's search. All 0 before the first launch, except for the floor.
struct alignas(16) FloorSearch {
  unsigned long long bins[kBins];
  uint64_t above, limit;
  uint32_t prefix;     // the highest bits of the value, as far as they are known
  uint32_t arrived;    // finished blocks of this launch
  uint32_t abandoned;  // 1 + the filter whose limit is never exceeded
  float floor;         // result so far
};

// Summaries of a row, over its chunks of kRaceChunk logits: see token_confidence_scan.cuh.
struct ChunkArrays {
  float *largest, *weight, *exponent;
  uint32_t* flags;  // one for each kWarpChunks chunks
};

struct ConfidenceLaunch {
  TokenConfidenceParams p;
  float* sums;            // [N, 4, chunks]
  FloorSearch* searches;  // [N], if rows may be filtered
  uint32_t chunks;        // per row
  bool refining;          // the second scan, of rows whose summaries are filtered
  Filter filter;
  uint32_t level;            // of the search: 11, 11 and 10 bits of the value
  uint32_t first = 0;        // first row, out of p.N
  uint32_t first_chunk = 0;  // index of the first chunk within the whole vocabulary

  // The floor of a filtered row.
  DLM_DEVICE float floor(uint32_t n) const { return searches[n].floor; }
  DLM_DEVICE ChunkArrays sums_of(uint32_t n) const {
    float* own = sums + int64_t(n) * 4 * chunks;
    return {own, own + chunks, own + 2 * chunks, reinterpret_cast<uint32_t*>(own + 3 * chunks)};
  }
};

// Called by all `blocks` blocks of a row before its search.
DLM_DEVICE void clear_search(FloorSearch& search, uint32_t block, uint32_t blocks) {
  for (uint32_t b = block * blockDim.x + threadIdx.x; b < kBins; b += blocks * blockDim.x)
    search.bins[b] = 0;
  if (block != 0 || threadIdx.x != 0) return;
  search.above = search.limit = 0;
  search.prefix = search.arrived = search.abandoned = 0;
  search.floor = -INFINITY;
}

template <class T>
class FloorLevel {
  struct Crossing {  // the bin that crosses the limit, the sums above it and in all bins
    uint64_t above, total;
    uint32_t bin;
  };

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<uint32_t>(kBins)
        .template take<uint32_t>(kBins)
        .template take<uint32_t>(kMaxWarps)
        .template take<uint64_t>(kFilterWarps)
        .template take<Crossing>(1);
  }
  DLM_DEVICE FloorLevel(const ConfidenceLaunch& job, SmemCarver& smem)
      : job_(job),
        low_(smem.take<uint32_t>(kBins)),
        high_(smem.take<uint32_t>(kBins)),
        partial_(smem.take<uint32_t>(kMaxWarps)),
        of_warp_(smem.take<uint64_t>(kFilterWarps)),
        crossing_(smem.take<Crossing>(1)),
        blocks_((job.chunks + kFilterChunks - 1) / kFilterChunks),
        n_(job.first + blockIdx.x / blocks_),
        block_(blockIdx.x % blocks_),
        plan_(job.p, n_),
        sums_(job.sums_of(n_)),
        search_(job.searches[n_]) {}

  DLM_DEVICE void run() {
    if (!plan_.used() || !plan_.filters || !is_asked()) return;  // all blocks of the row
    if (search_.abandoned == 1 + uint32_t(job_.filter)) return;
    const float max = largest();
    if (max == -INFINITY) return;  // all blocks of the row

    for (uint32_t b = threadIdx.x; b < kBins; b += kFilterThreads) low_[b] = high_[b] = 0;
    __syncthreads();
    fill(max);
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < kBins; b += kFilterThreads) {
      const unsigned long long sum = uint64_t(high_[b]) << 32 | low_[b];
      if (sum) atomicAdd(&search_.bins[b], sum);
    }
    if (is_last_to_arrive()) finish(max);
  }

 private:
  DLM_DEVICE bool by_mass() const { return job_.filter == Filter::kMass; }
  DLM_DEVICE bool is_asked() const {
    return by_mass() ? plan_.top_p < 1.0f : plan_.k > 0 && plan_.k < job_.p.V;
  }
  DLM_DEVICE uint32_t shift() const { return job_.level == 0 ? 21 : job_.level == 1 ? 10 : 0; }
  DLM_DEVICE uint32_t bits() const { return job_.level < 2 ? 11 : 10; }

  DLM_DEVICE float largest() const {
    uint32_t top = 0;
    for (uint32_t c = threadIdx.x; c < job_.chunks; c += kFilterThreads)
      top = max(top, ordered_bits(sums_.largest[c]));
    return ordered_value(block_reduce<Greatest>(top, partial_));
  }

  // Chunks that contain no logit in the level's bins are not read.
  DLM_DEVICE void fill(float max) const {
    const LogitsRow<T> row(job_.p, n_, plan_.source);
    // The mass of what top-k left, unless top-p comes first.
    const float least = by_mass() && !job_.p.top_p_first ? search_.floor : -INFINITY;
    const uint32_t base = search_.prefix << bits();
    const uint32_t first = block_ * kFilterChunks, end = min(first + kFilterChunks, job_.chunks);
#pragma unroll 1
    for (uint32_t chunk = first + warp_index(); chunk < end; chunk += kFilterWarps) {
      const float top = sums_.largest[chunk];
      if (top == -INFINITY || top < least || ordered_bits(top) >> shift() < base) continue;
      float z[8];
      uint32_t flags = 0;
      row.effective(chunk, z, flags);
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const uint32_t bin = (ordered_bits(z[j]) >> shift()) - base;
        if (z[j] > -INFINITY && z[j] >= least && bin < 1u << bits())
          add(bin, by_mass() ? mass(z[j], max) : 1);
      }
    }
  }

  DLM_DEVICE uint64_t mass(float z, float max) const {
    return mass_of(chunk_weight(z, max, plan_.inverse));
  }

  DLM_DEVICE void add(uint32_t bin, uint64_t measure) const {
    const uint32_t low = uint32_t(measure);
    const uint32_t before = low ? atomicAdd(&low_[bin], low) : 0;
    const uint32_t high = uint32_t(measure >> 32) + uint32_t(before + low < before);
    if (high) atomicAdd(&high_[bin], high);
  }

  DLM_DEVICE bool is_last_to_arrive() {
    __syncthreads();
    if (threadIdx.x == 0)
      crossing_->bin = ptx::atomic_add_acq_rel(&search_.arrived, 1) + 1 == blocks_;
    __syncthreads();
    const bool last = crossing_->bin;
    __syncthreads();
    return last;
  }

  // Called by the last block: evaluates the row's bins, then clears them for the next launch.
  DLM_DEVICE void finish(float max) {
    find();
    for (uint32_t b = threadIdx.x; b < kBins; b += kFilterThreads) search_.bins[b] = 0;
    if (threadIdx.x != 0) return;
    const Crossing found = *crossing_;
    search_.arrived = 0;
    if (found.bin == kBins) {
      search_.abandoned = 1 + uint32_t(job_.filter);
      return;
    }
    if (job_.level == 0) search_.limit = limit_of(found.total);
    search_.above = found.above;
    search_.prefix = search_.prefix << bits() | found.bin;
    if (job_.level < 2) return;
    float floor = ordered_value(search_.prefix);
    if (by_mass() && !job_.p.keep_crossing) floor = fminf(ordered_value(search_.prefix + 1), max);
    search_.floor = fmaxf(search_.floor, floor);
    search_.above = 0;
    search_.prefix = 0;
  }

  DLM_DEVICE uint64_t limit_of(uint64_t total) const {
    return by_mass() ? uint64_t(fmax(double(plan_.top_p) * double(total), 0.0))
                     : uint64_t(plan_.k - 1);
  }

  // The highest bin such that the sum of it and all higher bins exceeds the limit; kBins if there
  // is none.
  DLM_DEVICE void find() const {
    constexpr uint32_t each = kBins / kFilterThreads;
    const uint32_t lane = lane_index(), highest = kBins - 1 - threadIdx.x * each;
    uint64_t bin[each], mine = 0;
#pragma unroll
    for (uint32_t i = 0; i < each; ++i) {
      bin[i] = search_.bins[highest - i];
      mine += bin[i];
    }
    uint64_t upto = mine;  // over this warp's threads up to this one
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, upto, distance);
      if (lane >= distance) upto += other;
    }
    if (lane == 31) of_warp_[warp_index()] = upto;
    if (threadIdx.x == 0) crossing_->bin = kBins;
    __syncthreads();
    uint64_t total = 0, before = search_.above + upto - mine;
    for (uint32_t w = 0; w < kFilterWarps; ++w) {
      if (w < warp_index()) before += of_warp_[w];
      total += of_warp_[w];
    }
    const uint64_t limit = job_.level == 0 ? limit_of(total) : search_.limit;
#pragma unroll
    for (uint32_t i = 0; i < each; ++i) {
      const uint64_t next = before + bin[i];
      if (before <= limit && limit < next) *crossing_ = {before, total, highest - i};
      before = next;
    }
    __syncthreads();
  }

  const ConfidenceLaunch& job_;
  uint32_t *const low_, *const high_, *const partial_;
  uint64_t* const of_warp_;
  Crossing* const crossing_;
  const uint32_t blocks_, n_, block_;
  const RowPlan plan_;
  const ChunkArrays sums_;
  FloorSearch& search_;
};

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    search_floors_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  FloorLevel<T>(job, smem).run();
}

template <class T>
cudaError_t start_floor_searches(ConfidenceLaunch job, cudaStream_t stream) {
  const uint32_t blocks = (job.chunks + kFilterChunks - 1) / kFilterChunks;
  cudaError_t error = cudaSuccess;
  for (const Filter filter : {Filter::kCount, Filter::kMass}) {
    if (filter == Filter::kCount ? !job.p.top_k : !job.p.top_p) continue;
    job.filter = filter;
    for (job.level = 0; job.level < 3 && error == cudaSuccess; ++job.level) {
      error = launch(search_floors_kernel<T>, dim3(uint32_t(job.p.N) * blocks),
                     dim3(kFilterThreads), FloorLevel<T>::smem().bytes, stream, job);
    }
  }
  return error;
}

}  // namespace dlm::cuda
