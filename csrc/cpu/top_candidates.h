// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// The instruction set whose kernels are used when `isa` is in use.
Isa top_candidates_isa(Isa isa);

// Number of floats of working memory per row.
int64_t top_candidates_sums(int64_t V);

// Processes rows in two steps: first parts [begin, end) of all rows (part i belongs to row i /
// token_confidence_parts(V)), then rows [begin, end).
void top_candidates_scan(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end);
void top_candidates_finish(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end);

// A row's candidates so far, best first: distinct keys of common/order.h.
struct Candidates {
  int64_t k, count = 0;
  float least;  // lower bound of the k best
  uint64_t key[kMostCandidates];
  float value[kMostCandidates];
};

// Adds a chunk's logits, the first of which has the id `first`. Chunks come in ascending order.
using AddCandidates = void (*)(const float* z, int64_t first, Candidates& best);
AddCandidates add_candidates_kernel();  // of the instruction set in use

namespace generic {
void add_candidates(const float* z, int64_t first, Candidates& best);
}
namespace avx2 {
void add_candidates(const float* z, int64_t first, Candidates& best);
}
namespace avx512 {
void add_candidates(const float* z, int64_t first, Candidates& best);
}

}  // namespace dlm::cpu
