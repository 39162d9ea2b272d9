// SPDX-License-Identifier: Apache-2.0
// top_candidates of logits = hidden states times an LM head, without storing the logits
// (csrc/cpu/lm_head_candidates.cpp).
#pragma once
#include "cpu/lm_head_confidence.h"
#include "cpu/top_candidates.h"

namespace dlm::cpu {

constexpr int64_t kMostHeadShares = 64;

// Output rows are processed in slices, one after the other in the same memory; the vocabulary of a
// slice is divided into shares.
struct HeadCandidatesPlan {
  int64_t rows;       // per slice; the last one may have fewer
  int64_t shares;     // of the vocabulary; also the number of threads that finish rows
  int64_t workspace;  // bytes, aligned to 64
};
HeadCandidatesPlan plan_lm_head_candidates(const LmHeadCandidatesParams& p, int64_t threads);

// Processes a slice of rows [begin, end): pack it, scan all shares, then finish its rows. Each step
// may run in any number of threads; `share` identifies the work of a thread.
void pack_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end);
void scan_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                          void* workspace, int64_t begin, int64_t end, int64_t share);
void finish_head_candidates(const LmHeadCandidatesParams& p, const HeadCandidatesPlan& plan,
                            void* workspace, int64_t begin, int64_t end, int64_t share);

namespace generic {
// Merges the k best of `count` shares, which are `stride` elements apart; ids and values are [k].
void merge_candidates(const Candidates* of_share, int64_t count, int64_t stride, int64_t k,
                      int64_t* ids, float* values);
}  // namespace generic

}  // namespace dlm::cpu
