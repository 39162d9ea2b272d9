// SPDX-License-Identifier: Apache-2.0
// The k best tokens of rows whose logits are never stored. A thread multiplies the chunks of its
// share of the vocabulary, 256 tokens at a time, with all rows of a slice. While a chunk's logits
// are in the cache, it computes the chunk's sums for each row, and keeps those logits that are
// among the k best of the share so far. Then the candidates of all shares are merged. The row's
// logsumexp follows from the sums, as in top_candidates; for it, the chunk of the argmax is
// multiplied once more. Memory: kBudget in total, whatever the number of rows. Bytes read: the
// weights once per slice.
#include "cpu/lm_head_candidates.h"

#include "cpu/lm_head_rows.h"

namespace dlm::cpu {
namespace {

constexpr int64_t kBudget = 8'000'000;  // bytes
constexpr Wanted kWanted{false, false, 1.0f, 1.0f};

// A row's arrays over its chunks: the largest logits, then the weights.
int64_t sums_of(int64_t V) { return 2 * chunks_of(V); }
ChunkSums sums_at(float* sums, int64_t row, int64_t V) {
  float* const own = sums + row * sums_of(V);
  return {own, own + chunks_of(V), nullptr, nullptr};
}

// The working memory of a slice, one array after the other.
struct Workspace {
  Workspace(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan, void* memory) {
    uintptr_t next = reinterpret_cast<uintptr_t>(memory);
    const auto take = [&](int64_t bytes) {
      const uintptr_t at = next;
      next += uintptr_t(up_to(bytes, 64));
      return at;
    };
    const int64_t words = lm_head_kernels(p.head.rows.dtype).words(p.head.D);
    packed = reinterpret_cast<uint32_t*>(take(up_to(plan.rows, kHeadLanes) * words * 4));
    sums = reinterpret_cast<float*>(take(plan.rows * sums_of(p.head.rows.V) * 4));
    best =
        reinterpret_cast<Candidates*>(take(plan.shares * plan.rows * int64_t(sizeof(Candidates))));
    again = up_to(Multiplied::bytes(p.head), 64);
    scratch = reinterpret_cast<char*>(take(plan.shares * again));
    end = int64_t(next);
  }

  uint32_t* packed;
  float* sums;
  Candidates* best;  // [shares,rows]
  char* scratch;     // [shares,again]
  int64_t again, end;
};

}  // namespace

HeadCandidatesPlan plan_lm_head_candidates(const LmHeadCandidatesParams& p, int64_t threads) {
  HeadCandidatesPlan plan{};
  const int64_t N = p.head.rows.N;
  // Waking a second thread pays off from about 50 microseconds of work.
  const int64_t work = std::min(N, kMostHeadRows) * p.head.rows.V * std::max<int64_t>(p.head.D, 1);
  const int64_t most = std::min({threads, kMostHeadShares, chunks_of(p.head.rows.V)});
  plan.shares = std::clamp<int64_t>(work >> 23, 1, std::max<int64_t>(most, 1));
  plan.rows = std::min(N, kMostHeadRows);
  while (plan.rows > 1 && Workspace(p, plan, nullptr).end > kBudget) --plan.rows;
  const int64_t slices = (N + plan.rows - 1) / plan.rows;
  plan.rows = (N + slices - 1) / slices;
  plan.workspace = Workspace(p, plan, nullptr).end;
  return plan;
}

void pack_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end) {
  const Workspace memory(p, plan, workspace);
  pack(p.head, p.head.hidden, p.head.hidden_stride, begin, end, memory.packed);
}

void scan_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end, int64_t share) {
  const Workspace memory(p, plan, workspace);
  const TokenConfidenceParams& rows = p.head.rows;
  const LmHeadKernels head = lm_head_kernels(rows.dtype);
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const AddCandidates add = add_candidates_kernel();
  const int64_t chunks = chunks_of(rows.V), bytes = kRaceChunk * element_size(rows.dtype);
  Candidates* const best = memory.best + share * plan.rows;
  for (int64_t r = 0; r < end - begin; ++r) {
    best[r].k = p.k, best[r].count = 0;
    best[r].least = -kInfinity;
  }
  alignas(64) char logits[kMostHeadRows * kRaceChunk * sizeof(float)];
  alignas(64) float z[kRaceChunk];
  for (int64_t c = chunks * share / plan.shares; c < chunks * (share + 1) / plan.shares; ++c) {
    const int64_t first = c * kRaceChunk, last = std::min(first + kRaceChunk, rows.V);
    multiply(p.head, head, memory.packed, end - begin, first, last, logits, kRaceChunk);
    for (int64_t r = 0; r < end - begin; ++r) {
      Task task(rows, begin + r);
      if (task.source < 0) continue;
      task.row.logits = before(logits + r * bytes, first, rows.dtype);
      const ChunkSums sums = sums_at(memory.sums, r, rows.V);
      kernels.sum_chunks(task.row, c, c + 1, kWanted, sums);
      if (!(sums.largest[c] >= best[r].least) || !(sums.largest[c] > -kInfinity)) continue;
      kernels.load_chunk(task.row, c, z);
      add(z, first, best[r]);
    }
  }
}

void finish_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                            void* workspace, int64_t begin, int64_t end, int64_t share) {
  const Workspace memory(p, plan, workspace);
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const int64_t rows = end - begin, V = p.head.rows.V;
  for (int64_t r = rows * share / plan.shares; r < rows * (share + 1) / plan.shares; ++r) {
    const int64_t n = begin + r;
    generic::merge_candidates(memory.best + r, plan.shares, plan.rows, p.k, p.ids + n * p.k,
                              p.values + n * p.k);
    p.logsumexp[n] = -kInfinity;
    Task task(p.head.rows, n);
    if (task.source < 0 || p.ids[n * p.k] < 0) continue;
    Multiplied maker(p.head, task.row, n, memory.scratch + share * memory.again);
    maker.make(p.ids[n * p.k] / kRaceChunk);
    const Summary all = kernels.summarize(task.row, sums_at(memory.sums, r, V), false, 1.0f);
    p.logsumexp[n] = float(double(all.max) + std::log1p(all.weight));
  }
}

}  // namespace dlm::cpu
