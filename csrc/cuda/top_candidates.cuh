// SPDX-License-Identifier: Apache-2.0
// The k largest logits of a row, ties by the lowest id, and its logsumexp. token_confidence's scan
// summarizes the row chunk by chunk, with many blocks per row; then a block finishes each row. The
// k-th largest of the chunks' largest logits is a bound that at least k logits reach, so only
// chunks whose largest logit reaches it, about k of them, are read again: each by a warp, which
// keeps the 64 best keys that it has seen in its registers, two per lane. The keys kept by all
// warps are sorted. Reads V elements, and 256 k from L2.
#pragma once
#include "cuda/sort.cuh"
#include "cuda/token_confidence.cuh"
#include "cuda/top_candidates.h"

namespace dlm::cuda {

struct CandidatesLaunch {
  ConfidenceLaunch rows;
  uint32_t k;
  int64_t* ids;
  float *values, *logsumexp;
};

// The best 64 of the keys (common/order.h) that a warp has been given: lane l holds those of rank l
// and l + 32.
class WarpBest {
 public:
  static constexpr uint64_t kNone = ~uint64_t(0);

  DLM_DEVICE explicit WarpBest(uint32_t k) : last_(k - 1) {}

  // Adds each lane's key, which is kNone or has not been given before.
  DLM_DEVICE void add(uint64_t key) {
    uint64_t worst = of_rank(last_);
    uint32_t pending = __ballot_sync(kAllLanes, key < worst);
    while (pending) {
      insert(__shfl_sync(kAllLanes, key, __ffs(int(pending)) - 1));
      worst = of_rank(last_);
      pending &= pending - 1;
      pending &= __ballot_sync(kAllLanes, key < worst);
    }
  }
  DLM_DEVICE void store(uint64_t* to) const {
    to[lane_index()] = low_;
    to[lane_index() + 32] = high_;
  }

 private:
  DLM_DEVICE uint64_t of_rank(uint32_t rank) const {
    return __shfl_sync(kAllLanes, rank < 32 ? low_ : high_, int(rank % 32));
  }
  DLM_DEVICE void insert(uint64_t key) {
    const uint32_t lane = lane_index();
    const uint32_t rank = __popc(__ballot_sync(kAllLanes, low_ < key)) +
                          __popc(__ballot_sync(kAllLanes, high_ < key));
    const uint64_t before_low = __shfl_up_sync(kAllLanes, low_, 1);
    const uint64_t before_high = __shfl_up_sync(kAllLanes, high_, 1);
    const uint64_t carried = __shfl_sync(kAllLanes, low_, 31);
    if (lane + 32 >= rank) high_ = lane + 32 == rank ? key : lane == 0 ? carried : before_high;
    if (lane >= rank) low_ = lane == rank ? key : before_low;
  }

  const uint32_t last_;  // rank of the worst key that counts
  uint64_t low_ = kNone, high_ = kNone;
};

template <class T>
class CandidatesFinish {
  static constexpr uint32_t kKept = kFinishWarps * kMostCandidates;
  static_assert(kKept == 2 * kFinishThreads);  // two per thread are sorted

 public:
  static constexpr SmemSize smem() {
    return RowFinish<T>::smem()
        .template take<uint32_t>(2 * kMaxWarps)
        .template take<uint64_t>(kKept);
  }

  DLM_DEVICE CandidatesFinish(const CandidatesLaunch& job, SmemCarver& smem)
      : job_(job),
        statistics_(job.rows, smem),
        partial_(smem.take<uint32_t>(2 * kMaxWarps)),
        kept_(smem.take<uint64_t>(kKept)),
        n_(job.rows.first + blockIdx.x),
        plan_(job.rows.p, n_),
        largest_(job.rows.sums_of(n_).largest) {}

  DLM_DEVICE void run() {
    uint64_t key[2] = {WarpBest::kNone, WarpBest::kNone};
    float logsumexp = -INFINITY;
    if (plan_.used()) {  // block-uniform
      logsumexp = statistics_.logsumexp();
      collect();
      __syncthreads();
      key[0] = kept_[2 * threadIdx.x];
      key[1] = kept_[2 * threadIdx.x + 1];
      block_sort(key, kept_);
    }
    if (threadIdx.x == 0) job_.logsumexp[n_] = logsumexp;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) write(2 * threadIdx.x + i, key[i]);
  }

 private:
  // Collects each warp's best of every kFinishWarps-th chunk.
  DLM_DEVICE void collect() {
    const LogitsRow<T> row(job_.rows.p, n_, plan_.source);
    const float bound = kth_largest();
    WarpBest best(job_.k);
#pragma unroll 1
    for (uint32_t c = warp_index(); c < job_.rows.chunks; c += kFinishWarps) {
      if (!(largest_[c] >= bound)) continue;  // warp-uniform
      float z[8];
      uint32_t flags = 0;
      row.effective(c, z, flags);
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const bool counts = z[j] >= bound && z[j] > -INFINITY;
        best.add(counts ? descending_key(z[j], LogitsRow<T>::id_of(c, j)) : WarpBest::kNone);
      }
    }
    best.store(kept_ + warp_index() * kMostCandidates);
  }

  // The k-th largest of the chunks' largest logits; -inf if there are fewer chunks. Determined bit
  // by bit, starting with the highest: the largest value that k of them reach.
  DLM_DEVICE float kth_largest() const {
    if (job_.rows.chunks < job_.k) return -INFINITY;
    uint32_t value = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << 31, turn = 0; bit; bit /= 2, turn ^= kMaxWarps) {
      uint32_t count = 0;
      for (uint32_t c = threadIdx.x; c < job_.rows.chunks; c += kFinishThreads)
        count += ordered_bits(largest_[c]) >= (value | bit);
      if (block_reduce<Sum>(count, partial_ + turn) >= job_.k) value |= bit;
    }
    return ordered_value(value);
  }

  DLM_DEVICE void write(uint32_t rank, uint64_t key) const {
    if (rank >= job_.k) return;
    const int64_t at = int64_t(n_) * job_.k + rank;
    const bool there = key != WarpBest::kNone;
    job_.ids[at] = there ? int64_t(uint32_t(key)) : -1;
    job_.values[at] = there ? ordered_value(~uint32_t(key >> 32)) : -INFINITY;
  }

  const CandidatesLaunch& job_;
  RowFinish<T> statistics_;
  uint32_t* const partial_;
  uint64_t* const kept_;
  const uint32_t n_;
  const RowPlan plan_;
  const float* const largest_;
};

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    finish_candidates_kernel(const __grid_constant__ CandidatesLaunch job) {
  SmemCarver smem;
  CandidatesFinish<T>(job, smem).run();
}

template <class T>
cudaError_t start_candidates(const CandidatesLaunch& job, cudaStream_t stream) {
  const cudaError_t error = start_scan<T, false>(job.rows, stream);
  if (error != cudaSuccess) return error;
  return launch(finish_candidates_kernel<T>, dim3(uint32_t(job.rows.p.N)), dim3(kFinishThreads),
                CandidatesFinish<T>::smem().bytes, stream, job);
}

// `workspace` has workspace_of(p.rows) bytes, aligned to 16.
inline cudaError_t start_top_candidates(const TopCandidatesParams& p, void* workspace,
                                        cudaStream_t stream) {
  if (p.rows.N == 0) return cudaSuccess;
  const CandidatesLaunch job{
      {p.rows, static_cast<float*>(workspace), nullptr, uint32_t(chunks_of(p.rows)), false,
       Filter::kCount, 0},
      uint32_t(p.k), p.ids, p.values, p.logsumexp};
  if (p.rows.dtype == DType::kFloat32) return start_candidates<float>(job, stream);
  if (p.rows.dtype == DType::kFloat16) return start_candidates<Float16>(job, stream);
  return start_candidates<BFloat16>(job, stream);
}

}  // namespace dlm::cuda
