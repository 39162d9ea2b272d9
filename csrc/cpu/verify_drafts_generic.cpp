// SPDX-License-Identifier: Apache-2.0
// Accepts a prefix of each row's drafts and finds the token after it. With
//   p(v) = e^(z_v / T - logsumexp) of the target, q(v) of the draft distribution
// draft s passes with probability p(s) / (leniency q(s)), for which single logits are read. Only
// the first draft that fails needs its two whole rows of logits, for a draw from max(p(v) - q(v),
// 0) by a race (common/race.h). Without q, a draft passes if it equals the token that the target
// drew. Takes about 40 operations per logit of a failed draft; no tensor of probabilities is
// written.
#include <algorithm>

#include "common/race.h"
#include "cpu/random_words.h"
#include "cpu/verify_drafts.h"

namespace dlm::cpu::generic {
namespace {

template <class T>
class Row {
 public:
  Row(const VerifyDraftsParams& p, int64_t row)
      : p_(p),
        row_(row),
        drafts_(p.drafts + row * p.W),
        token_(p.token + row * (p.W + 1)),
        tokens_(p.tokens + row * (p.W + 1)) {
    const float temperature = p.temperature.at(row, 0.0f);
    by_ratio_ = p.draft_logits && temperature > 0.0f;
    if (!by_ratio_) return;
    inverse_ = div_rn(1.0f, temperature);
    seed_ = uint64_t(p.random.seed.at(row, 0));
    step_ = uint32_t(p.random.step.at(row, 0));
    position_ = uint32_t(p.random.position[row]);
  }

  void run() {
    int64_t accepted = 0;
    while (accepted < p_.W && drafts_[accepted] >= 0 && passes(accepted)) ++accepted;
    int64_t next = token_[accepted];
    if (accepted < p_.W && drafts_[accepted] >= 0 && has_ratio(accepted)) {
      const int64_t drawn = draw_rest(accepted);
      if (drawn >= 0) next = drawn;
    }
    std::copy_n(drafts_, accepted, tokens_);
    tokens_[accepted] = next;
    std::fill(tokens_ + accepted + 1, tokens_ + p_.W + 1, int64_t(-1));
    p_.accepted[row_] = int32_t(accepted);
  }

 private:
  int64_t target_row(int64_t i) const {
    const int64_t at = row_ * (p_.W + 1) + i;
    return p_.row_map ? p_.row_map[at] : at;
  }
  int64_t draft_row(int64_t i) const {
    const int64_t at = row_ * p_.W + i;
    return p_.draft_row_map ? p_.draft_row_map[at] : at;
  }
  bool has_ratio(int64_t i) const { return by_ratio_ && target_row(i) >= 0 && draft_row(i) >= 0; }

  const T* target(int64_t i) const {
    return static_cast<const T*>(p_.logits) + target_row(i) * p_.logits_stride;
  }
  const T* draft(int64_t i) const {
    return static_cast<const T*>(p_.draft_logits) + draft_row(i) * p_.draft_stride;
  }
  float target_logsumexp(int64_t i) const { return p_.logsumexp[row_ * (p_.W + 1) + i]; }
  float draft_logsumexp(int64_t i) const { return p_.draft_logsumexp[row_ * p_.W + i]; }
  bool banned(int64_t id) const {
    return std::find(p_.banned, p_.banned + p_.banned_count, id) != p_.banned + p_.banned_count;
  }

  bool passes(int64_t i) const {
    const int64_t id = drafts_[i];
    if (!has_ratio(i)) return id == token_[i];
    if (banned(id)) return false;
    const float p = tempered_probability(to_float(target(i)[id]), inverse_, target_logsumexp(i));
    const float q = tempered_probability(to_float(draft(i)[id]), inverse_, draft_logsumexp(i));
    const Philox4 bits = philox(seed_, position_ + uint32_t(i), step_, Stream::kVerify, 0);
    return bernoulli(bits.word[0], div_rn(p, mul_rn(p_.leniency, q)));
  }

  // Returns -1 if p exceeds q nowhere.
  int64_t draw_rest(int64_t i) const {
    float rest[kRaceChunk], best = 0.0f;
    uint32_t word[kRaceChunk];
    int64_t winner = -1;
    for (int64_t chunk = 0; chunk * kRaceChunk < p_.V; ++chunk) {
      subtract(i, chunk, rest);
      const float sum = chunk_sum(rest);
      // Exponential noise is at least 2^-33.
      if (!(sum > 0.0f) || sum * 1e10f < best) continue;
      random_words<1>(seed_, position_ + uint32_t(i), step_, Stream::kResidualChunk,
                      uint32_t(chunk / 4), word);
      const float key = weight_key(sum, word[chunk % 4]);
      if (!(key > best)) continue;
      best = key;
      winner = chunk;
    }
    if (winner < 0) return -1;
    subtract(i, winner, rest);
    random_words<kRaceChunk / 4>(seed_, position_ + uint32_t(i), step_, Stream::kResidual,
                                 uint32_t(winner * (kRaceChunk / 4)), word);
    float key[kRaceChunk];
    for (int j = 0; j < kRaceChunk; ++j) key[j] = weight_key(rest[j], word[j]);
    return winner * kRaceChunk + (std::max_element(key, key + kRaceChunk) - key);
  }

  // Writes max(p - q, 0) of a chunk, 0 beyond the vocabulary.
  void subtract(int64_t i, int64_t chunk, float* rest) const {
    const int64_t begin = chunk * kRaceChunk;
    const int n = int(std::min<int64_t>(kRaceChunk, p_.V - begin));
    const T *z = target(i) + begin, *y = draft(i) + begin;
    const float of_target = target_logsumexp(i), of_draft = draft_logsumexp(i);
    for (int j = 0; j < n; ++j) {
      const float more = tempered_probability(to_float(z[j]), inverse_, of_target) -
                         tempered_probability(to_float(y[j]), inverse_, of_draft);
      rest[j] = keep_if(more > 0.0f, more);
    }
    for (int j = n; j < kRaceChunk; ++j) rest[j] = 0.0f;
    for (int64_t k = 0; k < p_.banned_count; ++k) {
      const uint64_t at = uint64_t(p_.banned[k] - begin);
      if (at < uint64_t(n)) rest[at] = 0.0f;
    }
  }

  const VerifyDraftsParams& p_;
  const int64_t row_;
  const int64_t *drafts_, *token_;
  int64_t* tokens_;
  bool by_ratio_;
  float inverse_ = 1.0f;
  uint64_t seed_ = 0;
  uint32_t step_ = 0, position_ = 0;
};

template <class T>
void rows(const VerifyDraftsParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) Row<T>(p, b).run();
}

}  // namespace

void verify_drafts(const VerifyDraftsParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return rows<float>(p, begin, end);
    case DType::kBFloat16:
      return rows<BFloat16>(p, begin, end);
    default:
      return rows<Float16>(p, begin, end);
  }
}

}  // namespace dlm::cpu::generic
