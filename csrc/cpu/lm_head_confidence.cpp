// SPDX-License-Identifier: Apache-2.0
// token_confidence of logits that never are in memory. Rows are taken in slices. For a slice, a
// thread multiplies a chunk of 256 tokens of the vocabulary with all rows, rounds the logits to the
// hidden states' type, as a linear layer would, and describes each row's chunk by its sums while
// the logits are in the cache (token_confidence.h). What a row looks into again (the chunk of its
// argmax, of its draw, of a given token) is multiplied again, for that row: the same kernel, the
// same bits. Filters look into many chunks: then a slice is so small that its logits can be kept.
// Memory: kBudget in all, whatever the number of rows. Bytes: the weights once a slice.
#include "cpu/lm_head_confidence.h"

#include <cstring>

#include "cpu/isa.h"
#include "cpu/token_confidence_rows.h"

namespace dlm::cpu {
namespace {

constexpr int64_t kBudget = 8'000'000;        // bytes
constexpr int64_t kBudgetOfShares = 1 << 20;  // of them, for single rows that are multiplied again
constexpr int64_t kTileChunks = 4;            // that a thread takes at a time
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
LmHeadKernels kernels_of(DType dtype) { return best_for(isa(), kTable).kernels(dtype); }

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t tiles_of(int64_t V) { return (V + kTokens - 1) / kTokens; }
// A shard of the vocabulary may begin within a tile.
int64_t first_tile_of(const LmHeadConfidenceParams& p) { return p.rows.first / kTokens; }
bool filters(const TokenConfidenceParams& p) { return p.top_k || p.top_p; }
bool is_guided(const LmHeadConfidenceParams& p) { return p.uncond_hidden != nullptr; }

// The address of element 0 of an array whose element `first` is at `at`.
template <class T>
T* before(T* at, int64_t first) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(at) - uintptr_t(first) * sizeof(T));
}
const void* before(const void* at, int64_t first, DType dtype) {
  return before(static_cast<const char*>(at), first * element_size(dtype));
}

// What a slice works in, one array behind the other.
class Workspace {
 public:
  Workspace(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* memory)
      : next_(reinterpret_cast<uintptr_t>(memory)) {
    const int64_t V = p.rows.V, rows = plan.rows, lanes = up_to(rows, kHeadLanes);
    const int64_t words = kernels_of(p.rows.dtype).words(p.D);
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
  int32_t* row_map = nullptr;  // of the slice's rows, as token_confidence has it
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

// Hidden states of output rows [begin, end) as the kernels take them.
void pack(const LmHeadConfidenceParams& p, const void* hidden, int64_t stride, int64_t begin,
          int64_t end, uint32_t* to) {
  const LmHeadKernels kernels = kernels_of(p.rows.dtype);
  constexpr int64_t kGroup = 2 * kHeadLanes;
  for (int64_t first = begin; first < end; first += kGroup, to += kGroup * kernels.words(p.D)) {
    const void* rows[kGroup] = {};
    const int64_t n = std::min(kGroup, end - first);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source = p.rows.row_map ? p.rows.row_map[first + i] : first + i;
      if (source < 0) continue;
      rows[i] = static_cast<const char*>(hidden) + source * stride * element_size(p.rows.dtype);
    }
    kernels.pack(rows, p.D, up_to(n, kHeadLanes), to);
  }
}

// Logits of tokens [first, last) for rows that are packed.
void multiply(const LmHeadConfidenceParams& p, const LmHeadKernels& kernels, const uint32_t* packed,
              int64_t rows, int64_t first, int64_t last, char* out, int64_t out_stride) {
  const int64_t size = element_size(p.rows.dtype);
  for (int64_t v = first; v < last; v += kernels.tokens) {
    const char* weight = static_cast<const char*>(p.weight) + v * p.weight_stride * size;
    kernels.multiply(packed, rows, weight, p.weight_stride, std::min(kernels.tokens, last - v), p.D,
                     out + (v - first) * size, out_stride);
  }
}

// One row, any of whose chunks can be multiplied again.
class Multiplied final : public ChunkMaker {
 public:
  Multiplied(const LmHeadConfidenceParams& p, LogitsRow& row, int64_t n, char* scratch)
      : p_(p),
        row_(row),
        kernels_(kernels_of(p.rows.dtype)),
        packed_(reinterpret_cast<uint32_t*>(scratch)),
        uncond_packed_(packed_ + kHeadLanes * kernels_.words(p.D)) {
    pack(p, p.hidden, p.hidden_stride, n, n + 1, packed_);
    if (is_guided(p)) pack(p, p.uncond_hidden, p.uncond_stride, n, n + 1, uncond_packed_);
  }
  static int64_t bytes(const LmHeadConfidenceParams& p) {
    const int64_t words = kHeadLanes * kernels_of(p.rows.dtype).words(p.D);
    return words * int64_t(sizeof(uint32_t)) * (is_guided(p) ? 2 : 1);
  }

  void make(int64_t chunk) override {
    if (chunk == made_) return;
    made_ = chunk;
    const int64_t first = chunk * kRaceChunk, last = std::min(first + kRaceChunk, p_.rows.V);
    multiply(p_, kernels_, packed_, 1, first, last, logits_, kRaceChunk);
    row_.logits = before(logits_, first, row_.dtype);
    if (!is_guided(p_)) return;
    multiply(p_, kernels_, uncond_packed_, 1, first, last, uncond_logits_, kRaceChunk);
    row_.uncond = before(uncond_logits_, first, row_.dtype);
  }

 private:
  const LmHeadConfidenceParams& p_;
  LogitsRow& row_;
  const LmHeadKernels kernels_;
  uint32_t *const packed_, *const uncond_packed_;
  int64_t made_ = -1;
  alignas(64) char logits_[kRaceChunk * sizeof(float)];
  alignas(64) char uncond_logits_[kRaceChunk * sizeof(float)];
};

// The sums of tiles, of rows whose logits are not kept.
class TileScan {
 public:
  TileScan(const LmHeadConfidenceParams& p, const Workspace& memory, int64_t begin, int64_t end)
      : p_(p),
        memory_(memory),
        begin_(begin),
        rows_(end - begin),
        kernels_(kernels_of(p.rows.dtype)),
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
      Task task(p_.rows, begin_ + r);
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

// Rows of a slice whose logits are kept, as token_confidence takes them.
TokenConfidenceParams kept_rows(const LmHeadConfidenceParams& p, const Workspace& memory,
                                int64_t begin) {
  TokenConfidenceParams rows = p.rows;
  rows.logits_stride = rows.uncond_stride = rows.V;
  rows.logits = before(memory.logits, begin * rows.V, rows.dtype);
  rows.uncond_logits =
      is_guided(p) ? before(memory.uncond_logits, begin * rows.V, rows.dtype) : nullptr;
  rows.row_map = before(memory.row_map, begin);
  return rows;
}

int64_t bytes_of(const LmHeadConfidenceParams& p, const LmHeadPlan& plan) {
  return Workspace(p, plan, nullptr).end();
}

}  // namespace

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
  plan.rows = std::min(p.rows.N, kMostHeadRows);
  while (plan.rows > 1 && bytes_of(p, plan) > kBudget) --plan.rows;
  // As many slices as it takes, of as many rows each.
  const int64_t slices = (p.rows.N + plan.rows - 1) / plan.rows;
  plan.rows = (p.rows.N + slices - 1) / slices;
  plan.shares = std::min(plan.shares, plan.rows);
  plan.workspace = bytes_of(p, plan);
  return plan;
}

void pack_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                  int64_t begin, int64_t end) {
  const Workspace memory(p, plan, workspace);
  pack(p, p.hidden, p.hidden_stride, begin, end, memory.packed);
  if (is_guided(p)) pack(p, p.uncond_hidden, p.uncond_stride, begin, end, memory.uncond_packed);
  for (int64_t n = begin; plan.whole && n < end; ++n) {
    const bool is_used = !p.rows.row_map || p.rows.row_map[n] >= 0;
    memory.row_map[n - begin] = is_used ? int32_t(n) : -1;
  }
}

void multiply_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                      int64_t begin, int64_t end, int64_t first_tile, int64_t last_tile) {
  const Workspace memory(p, plan, workspace);
  if (plan.whole) {
    const LmHeadKernels kernels = kernels_of(p.rows.dtype);
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
    const TokenConfidenceParams rows = kept_rows(p, memory, begin);
    return token_confidence(rows, before(memory.sums, begin * RowSums::floats(rows.V)), scratch,
                            first, last);
  }
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const int64_t V = p.rows.V, tiles = tiles_of(V);
  for (int64_t n = first; n < last; ++n) {
    Task task(p.rows, n);
    const int32_t* of_tiles = memory.flags + (n - begin) * tiles;
    int32_t flags = 0;
    for (int64_t tile = first_tile_of(p); task.source >= 0 && tile < tiles; ++tile)
      flags |= of_tiles[tile];
    Multiplied maker(p, task.row, n, scratch);
    Row(kernels, p.rows, n, task, RowSums(memory.sums, n - begin, V, task), nullptr, &maker)
        .finish(flags);
  }
}

}  // namespace dlm::cpu
