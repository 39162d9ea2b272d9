// SPDX-License-Identifier: Apache-2.0
// Selects the slots of a window to commit, one row at a time:
//   E = eligible slots whose score is a number above -inf
//   P = the slots of E that pass gate and rule
//   selected = the best `cap` of P if |P| >= min(need, |E|), else the best `fill` of E
// Slots are represented by 64-bit keys (common/order.h: value and slot in one), so keys are
// distinct and totally ordered. Rules that consider one slot at a time filter the keys; only rules
// over prefixes sort them; "the best k" is one std::nth_element. Reads 5 to 10 bytes per slot;
// comparisons, not memory, are the limit.
#include <algorithm>
#include <limits>

#include "common/fixed_point.h"
#include "common/order.h"
#include "common/philox.h"
#include "cpu/select_tokens.h"

namespace dlm::cpu::generic {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kNoLimit = std::numeric_limits<int32_t>::max();

class Row {
 public:
  Row(const SelectTokensParams& p, int64_t row)
      : p_(p), row_(row), offset_(row * p.W), score_(p.score + offset_) {}

  static uint32_t slot(uint64_t key) { return uint32_t(key); }

  // Writes the keys of E, or of those slots of E that pass the gate, in slot order; returns their
  // number.
  int64_t gather(uint64_t* keys, const uint8_t* gate) const {
    const uint8_t* eligible = p_.eligible + offset_;
    const uint8_t* within = gate ? gate + offset_ : eligible;
    int64_t n = 0;
    for (int64_t w = 0; w < p_.W; ++w) {
      keys[n] = descending_key(score_[w], uint32_t(w));
      n += (eligible[w] != 0) & (within[w] != 0) & (score_[w] > -kInfinity);  // false for NaN
    }
    const float temperature = p_.order_temperature.at(row_, 0.0f);
    if (temperature > 0.0f) {
      const float inverse = 1.0f / temperature;
      for (int64_t i = 0; i < n; ++i) {
        const float value = score_[slot(keys[i])] * inverse + gumbel(bits(Stream::kOrder, keys[i]));
        keys[i] = descending_key(value == value ? value : -kInfinity, slot(keys[i]));
      }
    }
    return n;
  }

  // Moves those of n keys that pass the rule to the front; returns their number.
  int64_t apply_rule(uint64_t* keys, int64_t n) const {
    const float parameter = p_.parameter.at(row_, 0.0f);
    switch (p_.rule) {
      case Rule::kNone:
        return 0;
      case Rule::kAll:
        return n;
      case Rule::kThreshold:
        return filter(keys, n, [&](uint64_t key) { return reaches(key, parameter); });
      case Rule::kBernoulli:
        return filter(keys, n, [&](uint64_t key) {
          return bernoulli(bits(Stream::kBernoulli, key), p_.cost[offset_ + slot(key)]);
        });
      case Rule::kFactor: {
        std::sort(keys, keys + n);
        int64_t length = std::min<int64_t>(n, 1);
        while (length < n && reaches(keys[length], 1.0f - parameter / float(length + 2))) ++length;
        return length;
      }
      case Rule::kEntropyBound:
      case Rule::kEntropySum:
        std::sort(keys, keys + n);
        return within_budget(keys, n, fixed_point(parameter, 0.0f));
    }
    return 0;
  }

 private:
  uint32_t bits(Stream stream, uint64_t key) const {
    const int32_t position = p_.random.position[offset_ + slot(key)];
    return philox(uint64_t(p_.random.seed.at(row_, 0)), uint32_t(position),
                  uint32_t(p_.random.step.at(row_, 0)), stream, 0)
        .word[0];
  }

  bool reaches(uint64_t key, float level) const {
    const float score = score_[slot(key)];
    return p_.strict ? score > level : score >= level;
  }

  template <class Passes>
  static int64_t filter(uint64_t* keys, int64_t n, const Passes& passes) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t key = keys[i];
      keys[kept] = key;
      kept += passes(key);
    }
    return kept;
  }

  int64_t within_budget(const uint64_t* keys, int64_t n, int64_t budget) const {
    int64_t sum = 0, largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t cost = fixed_point(p_.cost[offset_ + slot(keys[i])], kMaxCost);
      sum += cost;
      largest = std::max(largest, cost);
      if (p_.rule == Rule::kEntropyBound ? sum - largest > budget : sum >= budget) return i;
    }
    return n;
  }

  const SelectTokensParams& p_;
  const int64_t row_, offset_;
  const float* score_;
};

}  // namespace

void select_tokens(const SelectTokensParams& p, int64_t begin, int64_t end) {
  uint64_t keys[kMaxSlots];
  for (int64_t b = begin; b < end; ++b) {
    const Row row(p, b);
    const bool ruled = p.rule != Rule::kNone;
    int64_t n = ruled ? row.apply_rule(keys, row.gather(keys, p.gate)) : 0;
    int64_t best = p.cap.at(b, kNoLimit);
    if (!ruled || n < p.need.at(b, 0)) {
      const int64_t passed = n;
      n = row.gather(keys, nullptr);
      if (!ruled || passed < n) best = p.fill.at(b, 0);  // otherwise P is all of E, which is enough
    }
    best = std::min(std::max<int64_t>(best, 0), n);
    if (best < n) std::nth_element(keys, keys + best, keys + n);

    bool* selected = p.selected + b * p.W;
    std::fill_n(selected, p.W, false);
    for (int64_t i = 0; i < best; ++i) selected[Row::slot(keys[i])] = true;
    p.count[b] = int32_t(best);
  }
}

}  // namespace dlm::cpu::generic
