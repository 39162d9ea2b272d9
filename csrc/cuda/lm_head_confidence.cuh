// SPDX-License-Identifier: Apache-2.0
// token_confidence of logits = hidden states times an LM head, without storing all logits. Rows are
// processed in groups, as many as the workspace has room for. A group is scanned in tiles of up to
// 128 rows (lm_head_confidence_scan.cuh) and finished (lm_head_confidence_finish.cuh). Filters look
// at whole rows; in that case a group is so small that its logits can be stored for
// token_confidence's kernels. A row's bits do not depend on its group and tile. Bytes: the weights
// once per group.
#pragma once
#include <algorithm>

#include "cuda/lm_head_confidence.h"
#include "cuda/lm_head_confidence_finish.cuh"
#include "cuda/lm_head_confidence_launch.cuh"
#include "cuda/token_confidence.cuh"

namespace dlm::cuda {

#ifndef DLM_SIMT
// Instantiated in separate files, for parallel builds.
extern template cudaError_t start_head_scan<float>(const HeadLaunch&, cudaStream_t);
extern template cudaError_t start_head_scan<BFloat16>(const HeadLaunch&, cudaStream_t);
extern template cudaError_t start_head_scan<Float16>(const HeadLaunch&, cudaStream_t);
#endif

constexpr int64_t kHeadBudget = 8'000'000;  // bytes of workspace

inline const char* why_not_lm_head_confidence(const LmHeadConfidenceParams& p) {
  // Ids, rows, columns and blocks are counted in 32 bits.
  if (p.rows.V > 0x7fff0000) return "weight must have fewer than 2^31 - 2^16 rows";
  if (p.rows.N > 0x7fff0000) return "row_map or hidden must have fewer than 2^31 - 2^16 rows";
  if (p.D > 0x7fff0000) return "hidden must have fewer than 2^31 - 2^16 columns";
  return nullptr;
}

// Working memory of a group of rows, one array after the other, each aligned to 16 bytes.
class HeadWorkspace {
 public:
  // `keeps`: whether logits are stored.
  HeadWorkspace(const LmHeadConfidenceParams& p, bool keeps, int64_t rows, void* memory)
      : next_(reinterpret_cast<uintptr_t>(memory)) {
    const TokenConfidenceParams& q = p.rows;
    const int64_t chunks = chunks_of(q);
    if (!keeps) {
      sums = take<float>(rows * HeadChunks::kArrays * chunks);
      given = take<float>(rows);
      return;
    }
    searches = take<FloorSearch>(may_filter(q) ? rows : 0);
    sums = take<float>(rows * 4 * chunks);
    row_map = take<int32_t>(rows);
    const int64_t bytes = rows * logits_stride(q) * element_size(q.dtype);
    logits = take<char>(bytes);
    if (p.uncond_hidden) uncond_logits = take<char>(bytes);
  }
  static int64_t bytes(const LmHeadConfidenceParams& p, bool keeps, int64_t rows) {
    return int64_t(HeadWorkspace(p, keeps, rows, nullptr).next_);
  }
  static int64_t logits_stride(const TokenConfidenceParams& q) { return (q.V + 7) / 8 * 8; }

  // The address of element 0 of an array whose element `first` is at `at`.
  template <class T>
  static T* before(T* at, int64_t first) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(at) - uintptr_t(first) * sizeof(T));
  }

  FloorSearch* searches = nullptr;
  float *sums = nullptr, *given = nullptr;
  int32_t* row_map = nullptr;
  char *logits = nullptr, *uncond_logits = nullptr;

 private:
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (uintptr_t(count) * sizeof(T) + 15) / 16 * 16;
    return taken;
  }
  uintptr_t next_;
};

// Rows per group; the last one may have fewer. There are as many groups as necessary; a group of
// several tiles consists of whole tiles.
inline int64_t head_group(const LmHeadConfidenceParams& p, bool keeps) {
  const int64_t N = p.rows.N;
  const int64_t tile = head_rows_of(
      p, p.rows.dtype == DType::kFloat32 ? kMostHeadRows<float> : kMostHeadRows<BFloat16>);
  const int64_t base = HeadWorkspace::bytes(p, keeps, 0);
  const int64_t a_row = HeadWorkspace::bytes(p, keeps, 1) - base;
  const int64_t most = std::clamp<int64_t>((kHeadBudget - base) / a_row, 1, N);
  const int64_t groups = (N + most - 1) / most, rows = (N + groups - 1) / groups;
  return rows == N || most < tile ? rows : std::min(most / tile, (rows + tile - 1) / tile) * tile;
}
inline int64_t head_workspace(const LmHeadConfidenceParams& p, bool keeps) {
  return p.rows.N == 0 ? 0 : HeadWorkspace::bytes(p, keeps, head_group(p, keeps));
}
inline int64_t head_group(const LmHeadConfidenceParams& p) {
  return head_group(p, may_filter(p.rows));
}
inline int64_t head_workspace(const LmHeadConfidenceParams& p) {
  return head_workspace(p, may_filter(p.rows));
}

// Whether all rows start at multiples of 16 bytes and their length is a multiple of 16 bytes.
inline bool is_aligned(const LmHeadConfidenceParams& p) {
  const uint64_t size = uint64_t(element_size(p.rows.dtype));
  const auto bits = [](const void* at) { return uint64_t(reinterpret_cast<uintptr_t>(at)); };
  return (bits(p.hidden) | bits(p.weight) | bits(p.uncond_hidden) | uint64_t(p.D) * size |
          uint64_t(p.hidden_stride) * size | uint64_t(p.weight_stride) * size |
          uint64_t(p.uncond_stride) * size) %
             16 ==
         0;
}

// Rows [job.first, job.end), whose logits are stored, as parameters of token_confidence's kernels.
inline ConfidenceLaunch kept_rows(const HeadLaunch& job, const HeadWorkspace& memory) {
  TokenConfidenceParams rows = job.p.rows;
  const int64_t first = job.first;
  rows.N = rows.R = job.end - first;
  rows.logits = memory.logits, rows.uncond_logits = memory.uncond_logits;
  rows.logits_stride = rows.uncond_stride = job.logits_stride;
  rows.row_map = HeadWorkspace::before(memory.row_map, first);
  return {rows,
          HeadWorkspace::before(memory.sums, first * 4 * job.chunks),
          HeadWorkspace::before(memory.searches, first),
          job.chunks,
          false,
          Filter::kCount,
          0,
          job.first};
}

// Processes groups of rows one after the other: the scan, then whatever finish(job, memory)
// launches.
template <class T, class Finish>
cudaError_t start_head_groups(const LmHeadConfidenceParams& p, bool keeps, void* workspace,
                              cudaStream_t stream, const Finish& finish) {
  const int64_t N = p.rows.N, group = head_group(p, keeps);
  const HeadWorkspace memory(p, keeps, group, workspace);
  HeadLaunch job{};
  job.p = p;
  job.chunks = uint32_t(chunks_of(p.rows));
  job.first_chunk = uint32_t(p.rows.first) / kRaceChunk;
  job.aligned = is_aligned(p);
  job.sums = memory.sums, job.given = memory.given, job.row_map = memory.row_map;
  job.logits = memory.logits, job.uncond_logits = memory.uncond_logits;
  job.logits_stride = HeadWorkspace::logits_stride(p.rows);
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < N && error == cudaSuccess; first += group) {
    job.first = uint32_t(first), job.end = uint32_t(std::min(first + group, N));
    error = start_head_scan<T>(job, stream);
    if (error == cudaSuccess) error = finish(job, memory);
  }
  return error;
}

template <class T>
cudaError_t start_head(const LmHeadConfidenceParams& p, void* workspace, cudaStream_t stream) {
  const bool keeps = may_filter(p.rows);
  return start_head_groups<T>(
      p, keeps, workspace, stream, [&](const HeadLaunch& job, const HeadWorkspace& memory) {
        const dim3 grid(job.end - job.first), threads(kFinishThreads);
        if (keeps) return start_rows<T>(kept_rows(job, memory), stream);
        if (p.rows.partial) {
          return launch(finish_head_shard_kernel<kFinishThreads>, grid, threads,
                        HeadShardFinish::smem().bytes, stream, job);
        }
        return launch(finish_head_kernel<kFinishThreads>, grid, threads, HeadFinish::smem().bytes,
                      stream, job);
      });
}

#ifndef DLM_SIMT
extern template cudaError_t start_head<float>(const LmHeadConfidenceParams&, void*, cudaStream_t);
extern template cudaError_t start_head<BFloat16>(const LmHeadConfidenceParams&, void*,
                                                 cudaStream_t);
extern template cudaError_t start_head<Float16>(const LmHeadConfidenceParams&, void*, cudaStream_t);
#endif

// `workspace` has head_workspace(p) bytes, aligned to 16.
inline cudaError_t start_lm_head_confidence(const LmHeadConfidenceParams& p, void* workspace,
                                            cudaStream_t stream) {
  if (p.rows.N == 0) return cudaSuccess;
  if (p.rows.dtype == DType::kFloat32) return start_head<float>(p, workspace, stream);
  if (p.rows.dtype == DType::kFloat16) return start_head<Float16>(p, workspace, stream);
  return start_head<BFloat16>(p, workspace, stream);
}

}  // namespace dlm::cuda
