// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/token_confidence.h"

namespace dlm::cpu {

// Whose kernels are used where `isa` is in use.
Isa top_candidates_isa(Isa isa);

// Floats to work in, for each row.
int64_t top_candidates_sums(int64_t V);

// In two steps: the parts [begin, end) of all rows (part i is of row i /
// token_confidence_parts(V)), then the rows [begin, end).
void top_candidates_scan(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end);
void top_candidates_finish(const TopCandidatesParams& p, float* sums, int64_t begin, int64_t end);

// A row's candidates so far, best first: keys of common/order.h, none twice.
struct Candidates {
  int64_t k, count = 0;
  float least;  // the k best are known to be at least this
  uint64_t key[kMostCandidates];
  float value[kMostCandidates];
};

// Takes a chunk's logits into account, of which the first has the id `first`. Chunks come in
// ascending order.
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
