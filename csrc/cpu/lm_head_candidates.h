// SPDX-License-Identifier: Apache-2.0
// top_candidates of logits = hidden states times an LM head, without the logits
// (csrc/cpu/lm_head_candidates.cpp).
#pragma once
#include "cpu/lm_head_confidence.h"
#include "cpu/top_candidates.h"

namespace dlm::cpu {

constexpr int64_t kMostHeadShares = 64;

// Output rows are taken in slices, one after the other, each in the same memory; the vocabulary of
// a slice in shares.
struct HeadCandidatesPlan {
  int64_t rows;       // of a slice, the last one may have fewer
  int64_t shares;     // of the vocabulary; also threads that finish rows at a time
  int64_t workspace;  // bytes, aligned to 64
};
HeadCandidatesPlan plan_lm_head_candidates(const LmHeadCandidatesParams& p, int64_t threads);

// A slice of rows [begin, end): pack it, scan all shares, then finish its rows, each step in any
// number of threads; `share` names what a thread does.
void pack_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end);
void scan_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end, int64_t share);
void finish_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                            void* workspace, int64_t begin, int64_t end, int64_t share);

namespace generic {
// The k best of what `count` shares found, each `stride` elements apart; ids and values [k].
void merge_candidates(const Candidates* of_share, int64_t count, int64_t stride, int64_t k,
                      int64_t* ids, float* values);
}  // namespace generic

}  // namespace dlm::cpu
