// SPDX-License-Identifier: Apache-2.0
// token_confidence of logits that are never stored. Rows are processed in slices. For a slice, a
// thread multiplies a chunk of 256 tokens of the vocabulary with all rows, rounds the logits to the
// type of the hidden states, as a linear layer would, and computes the chunk's sums for each row
// while the logits are in the cache (token_confidence.h). Chunks that a row has to read again
// (those of its argmax, of its draw and of a given token) are multiplied again for that row, by the
// same kernel and with the same bits. Filters read many chunks again; in that case a slice is made
// so small that its logits can be stored. Memory: kBudget in total, whatever the number of rows.
// Bytes read: the weights once per slice.
#include "cpu/lm_head_confidence.h"

#include "cpu/isa.h"
#include "cpu/lm_head_rows.h"

namespace dlm::cpu {
namespace {

constexpr int64_t kBudget = 8'000'000;        // bytes
constexpr int64_t kBudgetOfShares = 1 << 20;  // of it for single rows multiplied again
constexpr int64_t kTileChunks = 4;            // number that a thread takes at a time
constexpr int64_t kTokens = kTileChunks * kRaceChunk;

using Kernels = LmHeadKernels (*)(DType);
constexpr ForIsa<Kernels> kTable[] = {
    {Isa::kGeneric, generic::lm_head_confidence},
#ifdef DLM_X86
    {Isa::kAvx2, avx2::lm_head_confidence},
    {Isa::kAvx512, avx512::lm_head_confidence},
    {Isa::kAvx512Bf16, avx512bf16::lm_head_confidence},
#endif
#ifdef DLM_AMX
    {Isa::kAmx, amx::lm_head_confidence},
#endif
};

int64_t tiles_of(int64_t V) { return (V + kTokens - 1) / kTokens; }
// A shard of the vocabulary may begin inside a tile.
int64_t first_tile_of(const LmHeadConfidenceParams& p) { return p.rows.first / kTokens; }
bool filters(const TokenConfidenceParams& p) { return p.top_k || p.top_p; }

// The working memory of a slice, one array after the other.
class Workspace {
 public:
  Workspace(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* memory)
      : next_(reinterpret_cast<uintptr_t>(memory)) {
    const int64_t V = p.rows.V, rows = plan.rows, lanes = up_to(rows, kHeadLanes);
    const int64_t words = lm_head_kernels(p.rows.dtype).words(p.D);
    packed = take<uint32_t>(lanes * words);
    if (is_guided(p)) uncond_packed = take<uint32_t>(lanes * words);
    sums = take<float>(rows * RowSums::floats(V));
    if (plan.whole) {
      logits = take<char>(rows * V * element_size(p.rows.dtype));
      if (is_guided(p)) uncond_logits = take<char>(rows * V * element_size(p.rows.dtype));
      row_map = take<int32_t>(rows);
    } else {
      flags = take<int32_t>(rows * tiles_of(V));
    }
    scratch = take<char>(plan.shares * plan.scratch);
  }
  int64_t end() const { return int64_t(next_); }

  uint32_t *packed, *uncond_packed = nullptr;
  float* sums;
  char *logits = nullptr, *uncond_logits = nullptr;  // [rows,V]
  int32_t* row_map = nullptr;  // of the slice's rows, in the format of token_confidence
  int32_t* flags = nullptr;    // [rows,tiles]
  char* scratch;

 private:
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += uintptr_t(up_to(count * int64_t(sizeof(T)), 64));
    return taken;
  }
  uintptr_t next_;
};

// Sums over tiles, for rows whose logits are not stored.
class TileScan {
 public:
  TileScan(const LmHeadConfidenceParams& p, const Workspace& memory, int64_t begin, int64_t end)
      : p_(p),
        memory_(memory),
        begin_(begin),
        rows_(end - begin),
        kernels_(lm_head_kernels(p.rows.dtype)),
        sums_(token_confidence_kernels()) {}

  void run(int64_t tile) {
    const int64_t chunks = chunks_of(p_.rows.V), first = tile * kTileChunks;
    for (int64_t r = 0; r < rows_; ++r) memory_.flags[r * tiles_of(p_.rows.V) + tile] = 0;
    for (int64_t c = std::max(first, first_chunk(p_.rows));
         c < std::min(first + kTileChunks, chunks); ++c)
      describe(tile, c);
  }

 private:
  void describe(int64_t tile, int64_t chunk) {
    const int64_t V = p_.rows.V, first = chunk * kRaceChunk, last = std::min(first + kRaceChunk, V);
    multiply(p_, kernels_, memory_.packed, rows_, first, last, logits_, kRaceChunk);
    if (is_guided(p_))
      multiply(p_, kernels_, memory_.uncond_packed, rows_, first, last, uncond_logits_, kRaceChunk);
    const int64_t row_bytes = kRaceChunk * element_size(p_.rows.dtype);
    for (int64_t r = 0; r < rows_; ++r) {
      Task task(p_.rows, p_.output_row(begin_ + r));
      if (task.source < 0) continue;
      task.row.logits = before(logits_ + r * row_bytes, first, p_.rows.dtype);
      if (is_guided(p_))
        task.row.uncond = before(uncond_logits_ + r * row_bytes, first, p_.rows.dtype);
      const RowSums own(memory_.sums, r, V, task);
      memory_.flags[r * tiles_of(V) + tile] |=
          sums_.sum_chunks(task.row, chunk, chunk + 1, task.wanted(), own.of_chunk);
    }
  }

  const LmHeadConfidenceParams& p_;
  const Workspace& memory_;
  const int64_t begin_, rows_;
  const LmHeadKernels kernels_;
  const TokenConfidenceKernels sums_;
  alignas(64) char logits_[kMostHeadRows * kRaceChunk * sizeof(float)];
  alignas(64) char uncond_logits_[kMostHeadRows * kRaceChunk * sizeof(float)];
};

// The stored rows of a slice as parameters of token_confidence: output row n is row `i` of the used
// rows, and so on.
TokenConfidenceParams kept_rows(const LmHeadConfidenceParams& p, const Workspace& memory,
                                int64_t begin, int64_t i, int64_t n) {
  TokenConfidenceParams rows = p.rows;
  rows.logits_stride = rows.uncond_stride = rows.V;
  rows.logits = before(memory.logits, begin * rows.V, rows.dtype);
  rows.uncond_logits =
      is_guided(p) ? before(memory.uncond_logits, begin * rows.V, rows.dtype) : nullptr;
  rows.row_map = before(memory.row_map + (i - begin), n);
  return rows;
}

int64_t bytes_of(const LmHeadConfidenceParams& p, const LmHeadPlan& plan) {
  return Workspace(p, plan, nullptr).end();
}

}  // namespace

LmHeadKernels lm_head_kernels(DType dtype) { return best_for(isa(), kTable).kernels(dtype); }

Isa lm_head_confidence_isa(Isa isa) { return best_for(isa, kTable).isa; }

int64_t lm_head_tiles(const LmHeadConfidenceParams& p) {
  return tiles_of(p.rows.V) - first_tile_of(p);
}

LmHeadPlan plan_lm_head_confidence(const LmHeadConfidenceParams& p, int64_t threads) {
  LmHeadPlan plan{};
  plan.whole = filters(p.rows);
  plan.scratch = up_to(plan.whole ? FloorScratch::bytes(p.rows.V) : Multiplied::bytes(p), 64);
  const int64_t of_shares = plan.whole ? kBudget / 4 : kBudgetOfShares;
  plan.shares = std::clamp<int64_t>(of_shares / std::max<int64_t>(plan.scratch, 64), 1, threads);
  plan.rows = std::min(p.count(), kMostHeadRows);
  while (plan.rows > 1 && bytes_of(p, plan) > kBudget) --plan.rows;
  // As many slices as necessary, with equally many rows each.
  const int64_t slices = (p.count() + plan.rows - 1) / plan.rows;
  plan.rows = (p.count() + slices - 1) / slices;
  plan.shares = std::min(plan.shares, plan.rows);
  plan.workspace = bytes_of(p, plan);
  return plan;
}

void pack_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                  int64_t begin, int64_t end) {
  const Workspace memory(p, plan, workspace);
  pack(p, p.hidden, p.hidden_stride, begin, end, memory.packed);
  if (is_guided(p)) pack(p, p.uncond_hidden, p.uncond_stride, begin, end, memory.uncond_packed);
  for (int64_t i = begin; plan.whole && i < end; ++i) memory.row_map[i - begin] = int32_t(i);
}

void multiply_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                      int64_t begin, int64_t end, int64_t first_tile, int64_t last_tile) {
  const Workspace memory(p, plan, workspace);
  if (plan.whole) {
    const LmHeadKernels kernels = lm_head_kernels(p.rows.dtype);
    const int64_t V = p.rows.V, size = element_size(p.rows.dtype);
    const int64_t first = first_tile * kTokens, last = std::min(last_tile * kTokens, V);
    multiply(p, kernels, memory.packed, end - begin, first, last, memory.logits + first * size, V);
    if (is_guided(p)) {
      multiply(p, kernels, memory.uncond_packed, end - begin, first, last,
               memory.uncond_logits + first * size, V);
    }
    return;
  }
  TileScan scan(p, memory, begin, end);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) scan.run(first_tile_of(p) + tile);
}

void finish_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                    int64_t begin, int64_t end, int64_t share) {
  const Workspace memory(p, plan, workspace);
  char* const scratch = memory.scratch + share * plan.scratch;
  const int64_t first = begin + (end - begin) * share / plan.shares;
  const int64_t last = begin + (end - begin) * (share + 1) / plan.shares;
  if (plan.whole) {
    float* const sums = before(memory.sums, begin * RowSums::floats(p.rows.V));
    // Consecutive output rows are measured together.
    for (int64_t i = first, count; i < last; i += count) {
      const int64_t n = p.output_row(i);
      for (count = 1; i + count < last && p.output_row(i + count) == n + count;) ++count;
      token_confidence(kept_rows(p, memory, begin, i, n),
                       before(sums + i * RowSums::floats(p.rows.V), n * RowSums::floats(p.rows.V)),
                       scratch, n, n + count);
    }
    return;
  }
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const int64_t V = p.rows.V, tiles = tiles_of(V);
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = p.output_row(i);
    Task task(p.rows, n);
    const int32_t* of_tiles = memory.flags + (i - begin) * tiles;
    int32_t flags = 0;
    for (int64_t tile = first_tile_of(p); task.source >= 0 && tile < tiles; ++tile)
      flags |= of_tiles[tile];
    Multiplied maker(p, task.row, i, scratch);
    Row(kernels, p.rows, n, task, RowSums(memory.sums, i - begin, V, task), nullptr, &maker)
        .finish(flags);
  }
}

void finish_unused_row(const LmHeadConfidenceParams& p, int64_t n) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  Task task(p.rows, n);
  Row(kernels, p.rows, n, task, RowSums(nullptr, 0, p.rows.V, task), nullptr).finish(0);
}

}  // namespace dlm::cpu
