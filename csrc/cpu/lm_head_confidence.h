// SPDX-License-Identifier: Apache-2.0
// token_confidence of logits = hidden states times an LM head, without the logits: they exist for
// some rows and one chunk of the vocabulary at a time (csrc/cpu/lm_head_confidence.cpp).
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// Whose kernels are used where `isa` is in use.
Isa lm_head_confidence_isa(Isa isa);

// Writes the results of an output row that is not used.
void finish_unused_row(const LmHeadConfidenceParams& p, int64_t n);

// How the output rows, of p.used those alone, are taken in slices, one after the other, each in the
// same memory.
struct LmHeadPlan {
  int64_t rows;       // of a slice, the last one may have fewer
  bool whole;         // logits of a slice are kept: rows are filtered
  int64_t shares;     // threads that finish rows at a time
  int64_t scratch;    // bytes of each of these
  int64_t workspace;  // bytes in all, aligned to 64
};
LmHeadPlan plan_lm_head_confidence(const LmHeadConfidenceParams& p, int64_t threads);

// A slice of rows [begin, end): pack its rows, then multiply all tiles of the vocabulary, then
// finish its rows, each step in any number of threads; `share` names the finishing thread.
int64_t lm_head_tiles(const LmHeadConfidenceParams& p);
void pack_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                  int64_t begin, int64_t end);
void multiply_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                      int64_t begin, int64_t end, int64_t first_tile, int64_t last_tile);
void finish_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                    int64_t begin, int64_t end, int64_t share);

// --- what the kernels of an instruction set do ---------------------------------------------------

constexpr int kHeadLanes = 16;          // rows side by side
constexpr int kHeadTokens = 16;         // of the vocabulary, that a kernel multiplies side by side
constexpr int64_t kMostHeadRows = 128;  // of a slice
constexpr int64_t kHeadDepth = 256;     // words of a sum, before it is added to others

struct LmHeadKernels {
  // Words of 32 bits that a packed row has.
  int64_t (*words)(int64_t D);
  // Packs up to 2 * kHeadLanes rows [word][lane], `lanes` of them; those that are null are zero.
  void (*pack)(const void* const* rows, int64_t D, int64_t lanes, uint32_t* to);
  // Tokens that `multiply` takes at most.
  int64_t tokens;
  // Logits of that many tokens or fewer, of which the first has its weights at `weight`, for rows
  // that are packed in groups of 2 * kHeadLanes, the last one of kHeadLanes if that will do. A
  // row's logits are written side by side, rows `out_stride` elements apart.
  void (*multiply)(const uint32_t* packed, int64_t rows, const void* weight, int64_t stride,
                   int64_t tokens, int64_t D, void* out, int64_t out_stride);
};

LmHeadKernels lm_head_kernels(DType dtype);  // of the instruction set in use

namespace generic {
LmHeadKernels lm_head_confidence(DType dtype);
}
namespace avx2 {
LmHeadKernels lm_head_confidence(DType dtype);
}
namespace avx512 {
LmHeadKernels lm_head_confidence(DType dtype);
}
namespace avx512bf16 {
LmHeadKernels lm_head_confidence(DType dtype);
}
namespace amx {
LmHeadKernels lm_head_confidence(DType dtype);
}

}  // namespace dlm::cpu
