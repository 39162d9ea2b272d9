// SPDX-License-Identifier: Apache-2.0
// token_confidence of logits = hidden states times an LM head, without storing all logits: they
// exist only for some rows and one chunk of the vocabulary at a time
// (csrc/cpu/lm_head_confidence.cpp).
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// The instruction set whose kernels are used when `isa` is in use.
Isa lm_head_confidence_isa(Isa isa);

// Writes the results of an unused output row.
void finish_unused_row(const LmHeadConfidenceParams& p, int64_t n);

// How the output rows (only those of p.used) are divided into slices, which are processed one after
// the other in the same memory.
struct LmHeadPlan {
  int64_t rows;       // per slice; the last one may have fewer
  bool whole;         // the logits of a slice are stored, because rows are filtered
  int64_t shares;     // number of threads that finish rows
  int64_t scratch;    // bytes per share
  int64_t workspace;  // total bytes, aligned to 64
};
LmHeadPlan plan_lm_head_confidence(const LmHeadConfidenceParams& p, int64_t threads);

// Processes a slice of rows [begin, end): pack its rows, multiply all tiles of the vocabulary, then
// finish its rows. Each step may run in any number of threads; `share` identifies the finishing
// thread.
int64_t lm_head_tiles(const LmHeadConfidenceParams& p);
void pack_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                  int64_t begin, int64_t end);
void multiply_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                      int64_t begin, int64_t end, int64_t first_tile, int64_t last_tile);
void finish_lm_head(const LmHeadConfidenceParams& p, const LmHeadPlan& plan, void* workspace,
                    int64_t begin, int64_t end, int64_t share);

// --- the kernels of an instruction set -----------------------------------------------------------

constexpr int kHeadLanes = 16;          // rows side by side
constexpr int kHeadTokens = 16;         // tokens that a kernel multiplies side by side
constexpr int64_t kMostHeadRows = 128;  // per slice
constexpr int64_t kHeadDepth = 256;     // words that are summed before the sum is added to others

struct LmHeadKernels {
  // Number of 32-bit words of a packed row.
  int64_t (*words)(int64_t D);
  // Packs up to 2 * kHeadLanes rows as [word][lane], with `lanes` lanes; null rows become zero.
  void (*pack)(const void* const* rows, int64_t D, int64_t lanes, uint32_t* to);
  // Maximum number of tokens for `multiply`.
  int64_t tokens;
  // Computes logits of at most that many tokens, the first of which has its weights at `weight`,
  // for rows packed in groups of 2 * kHeadLanes (the last group may have kHeadLanes if that
  // suffices). A row's logits are adjacent; rows are `out_stride` elements apart.
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
