// SPDX-License-Identifier: Apache-2.0
// The k largest logits of a row, best first and ties by the lowest id, and the row's logsumexp. One
// pass computes the sums of the row's chunks of 256 logits, as in token_confidence: the largest
// logit, and the sum of e^(z - largest). The k-th largest of the chunks' largest logits is a bound
// that at least k logits reach, so only chunks whose largest logit reaches it are read again, about
// k of them.
#include "cpu/top_candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/isa.h"

namespace dlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Wanted kWanted{false, false, 1.0f, 1.0f};

constexpr ForIsa<AddCandidates> kTable[] = {
    {Isa::kGeneric, generic::add_candidates},
#ifdef DLM_X86
    {Isa::kAvx2, avx2::add_candidates},
    {Isa::kAvx512, avx512::add_candidates},
#endif
};

int64_t chunks_of(int64_t V) { return (V + kRaceChunk - 1) / kRaceChunk; }

struct Source {
  Source(const TopCandidatesParams& p, int64_t n)
      : number(p.rows.row_map ? p.rows.row_map[n] : n),
        row(logits_row(p.rows, n, std::max<int64_t>(number, 0))) {}

  int64_t number;  // -1: unused
  LogitsRow row;
};

// A row's arrays over its chunks; the third is working memory.
struct RowArrays {
  RowArrays(float* sums, int64_t n, int64_t V)
      : largest(sums + n * top_candidates_sums(V)),
        weight(largest + chunks_of(V)),
        sorted(weight + chunks_of(V)) {}
  ChunkSums of_chunk() const { return {largest, weight, nullptr, nullptr}; }

  float *largest, *weight, *sorted;
};

// The k-th largest of n floats, which are reordered; -inf if there are fewer than k.
float kth_largest(float* x, int64_t n, int64_t k) {
  if (n < k) return -kInfinity;
  std::nth_element(x, x + k - 1, x + n, std::greater<float>());
  return x[k - 1];
}

Candidates candidates(const TopCandidatesParams& p, const TokenConfidenceKernels& kernels,
                      const LogitsRow& row, const RowArrays& sums) {
  const int64_t chunks = chunks_of(p.rows.V);
  std::copy_n(sums.largest, chunks, sums.sorted);
  Candidates best;
  best.k = p.k;
  best.least = kth_largest(sums.sorted, chunks, p.k);
  const AddCandidates add = add_candidates_kernel();
  alignas(64) float z[kRaceChunk];
  for (int64_t c = 0; c < chunks; ++c) {
    if (!(sums.largest[c] >= best.least) || !(sums.largest[c] > -kInfinity)) continue;
    kernels.load_chunk(row, c, z);
    add(z, c * kRaceChunk, best);
  }
  return best;
}

void write(const TopCandidatesParams& p, int64_t n, const Candidates& best, float logsumexp) {
  for (int64_t i = 0; i < p.k; ++i) {
    const bool there = i < best.count;
    p.ids[n * p.k + i] = there ? int64_t(uint32_t(best.key[i])) : -1;
    p.values[n * p.k + i] = there ? best.value[i] : -kInfinity;
  }
  p.logsumexp[n] = logsumexp;
}

}  // namespace

AddCandidates add_candidates_kernel() { return best_for(isa(), kTable).kernels; }

Isa top_candidates_isa(Isa isa) { return best_for(isa, kTable).isa; }

int64_t top_candidates_sums(int64_t V) { return 3 * chunks_of(V); }

void top_candidates_scan(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const int64_t V = p.rows.V, parts = token_confidence_parts(V);
  constexpr int64_t kChunks = kPart / kRaceChunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / parts, first = i % parts * kChunks;
    const Source source(p, n);
    if (source.number < 0) continue;
    kernels.sum_chunks(source.row, first, std::min(first + kChunks, chunks_of(V)), kWanted,
                       RowArrays(sums, n, V).of_chunk());
  }
}

void top_candidates_finish(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  for (int64_t n = begin; n < end; ++n) {
    const Source source(p, n);
    const RowArrays own(sums, n, p.rows.V);
    Summary all;
    if (source.number >= 0) all = kernels.summarize(source.row, own.of_chunk(), false, 1.0f);
    if (all.argmax < 0) {
      write(p, n, {}, -kInfinity);
      continue;
    }
    const double logsumexp = double(all.max) + std::log1p(all.weight);
    write(p, n, candidates(p, kernels, source.row, own), float(logsumexp));
  }
}

}  // namespace dlm::cpu
