// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <string>
#include <tuple>

#include "common/params.h"
#include "torch/check.h"

namespace dlm {

// A [V]-like vector shared by all rows, or [P, V] with one row per group of N / P consecutive rows.
template <class T>
const T* shared_rows(const Check& check, const char* name, const MaybeTensor& t, int64_t columns,
                     int64_t N, int64_t* rows_per_value) {
  *rows_per_value = std::max<int64_t>(N, 1);
  if (!t) return nullptr;
  if (t->dim() == 2) {
    check.dense<T>(name, *t, {-1, columns});
    *rows_per_value = check.rows_per_value(name, t->size(0), N);
  } else {
    check.dense<T>(name, *t, {columns});
  }
  return static_cast<const T*>(t->const_data_ptr());
}

// Sets the bans and bitmask of `p`, whose N and V are already known.
inline void check_bans(const Check& check, const MaybeTensor& banned, const MaybeTensor& bitmask,
                       TokenConfidenceParams& p) {
  p.banned = shared_rows<int64_t>(check, "banned", banned, -1, p.N, &p.banned_rows_per_value);
  p.banned_count = banned ? banned->size(banned->dim() - 1) : 0;
  p.bitmask_words = (p.V + 31) / 32;
  p.bitmask = shared_rows<int32_t>(check, "bitmask", bitmask, p.bitmask_words, p.N,
                                   &p.bitmask_rows_per_value);
}

// The arguments shared by all ops that return the results of token_confidence.
struct ConfidenceArguments {
  const MaybeTensor &row_map, &given, &cfg_scale, &bias, &banned, &bitmask, &temperature, &top_k,
      &top_p;
  bool top_p_first, keep_crossing;
  const std::string& distribution;
  const MaybeTensor &seed, &step, &position, &redraw;
};
// Fills in `p`, whose R and V are already known. `uncond` is the argument that guidance needs,
// `uncond_name` its name. If `on_cpu`, values are checked as well. `ids` is the number of valid
// ids; -1 means V.
void check_confidence_arguments(const Check& check, const ConfidenceArguments& a, bool on_cpu,
                                const MaybeTensor& uncond, const char* uncond_name,
                                TokenConfidenceParams& p, int64_t ids = -1);

struct ConfidenceResults {
  Tensor token, argmax, confidence, margin, entropy, logsumexp, p_given, flags;

  // Allocates the results and sets the pointers of `p` to them.
  ConfidenceResults(const Check& check, bool with_margin, bool with_entropy,
                    TokenConfidenceParams& p);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {token, argmax, confidence, margin, entropy, logsumexp, p_given, flags};
  }
};

// Computes the rows of checked parameters in torch's threads, allocating memory from torch.
void token_confidence_on_cpu(const Check& check, const TokenConfidenceParams& p);
// Does the same, or runs on the device of `anchor` in torch's current stream.
void run_token_confidence(const Check& check, const Tensor& anchor, const TokenConfidenceParams& p);
void run_lm_head_confidence(const Check& check, const Tensor& anchor,
                            const LmHeadConfidenceParams& p);

}  // namespace dlm
