// SPDX-License-Identifier: Apache-2.0
// Which slots a query sees, for all kernels of block attention. In an anonymous namespace, because
// files compiled for different instruction sets must not share a copy of these functions.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/params.h"

namespace dlm::cpu {
namespace {

constexpr int64_t kKeys = 64;  // slots of a tile: one bit each in a SlotMask
using SlotMask = uint64_t;

// A word with bits [low, high) set, clamped to the word.
inline SlotMask bits_between(int64_t low, int64_t high) {
  low = std::max<int64_t>(low, 0);
  high = std::min<int64_t>(high, kKeys);
  if (low >= high) return 0;
  return ~SlotMask(0) >> (kKeys - (high - low)) << low;
}

// The attended ranges of one batch row. A range starts no earlier than the ranges before it end.
struct Ranges {
  const int32_t* data;  // [N,2]; null: [0,S)
  int64_t N, S;

  Ranges(const BlockAttentionParams& p, int64_t b)
      : data(p.kv_range ? p.kv_range + b * p.N * 2 : nullptr), N(p.N), S(p.S) {}

  // Calls f(start, end) for every non-empty range.
  template <class F>
  void each(const F& f) const {
    if (!data) {
      if (S > 0) f(int64_t(0), S);
      return;
    }
    int64_t reached = 0;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t start = std::max<int64_t>(data[2 * n], reached), end = data[2 * n + 1];
      if (start < end) f(start, end);
      reached = std::max(reached, end);
    }
  }
  // The slots of a tile that lie in a range.
  SlotMask tile(int64_t first) const {
    SlotMask bits = 0;
    each([&](int64_t start, int64_t end) { bits |= bits_between(start - first, end - first); });
    return bits;
  }
  // First attended slot and end of the last range; S and 0 if all ranges are empty.
  void hull(int64_t* first, int64_t* last) const {
    int64_t low = S, high = 0;
    each([&](int64_t start, int64_t end) {
      low = std::min(low, start);
      high = end;
    });
    *first = low;
    *last = high;
  }
};

// The slots [low, high) that causality and the sliding window leave visible to query i of batch row
// b.
inline void interval(const BlockAttentionParams& p, int64_t b, int64_t i, int64_t* low,
                     int64_t* high) {
  const int64_t slot = p.slot_of(b, i);
  *low = 0;
  *high = slot < 0 ? 0 : p.S;
  if (p.causal_block > 0) {
    const int64_t origin = p.block_origin.at(b, 0);
    const int64_t block_end =
        slot < origin ? origin : slot - (slot - origin) % p.causal_block + p.causal_block;
    *high = std::min(*high, block_end);
  }
  if (p.window_left >= 0) *low = std::max(*low, slot - p.window_left);
  if (p.window_right >= 0) *high = std::min(*high, slot + p.window_right + 1);
}

// The slots of the tile at `first` whose order is at most `limit`.
inline SlotMask in_order(const BlockAttentionParams& p, int64_t b, int64_t first, int64_t limit) {
  const int32_t* order = p.k_order + b * p.S + first;
  const int64_t width = std::min(kKeys, p.S - first);
  SlotMask open = 0;
  for (int64_t j = 0; j < width; ++j) open |= SlotMask(order[j] <= limit) << j;
  return open;
}

// Slots of new rows that `visible` hides from a query. If several rows have the same slot, any of
// them can hide it.
class NewRows {
 public:
  NewRows(const BlockAttentionParams& p, int64_t b) : p_(p), b_(b), first_(p.S), last_(0) {
    for (int64_t row = 0; p.visible && row < p.K; ++row) {
      const int64_t slot = p.new_slot_of(b, row);
      if (slot < 0) continue;
      first_ = std::min(first_, slot);
      last_ = std::max(last_, slot + 1);
    }
  }
  // Whether the tile at `slot` may contain such slots.
  bool touch(int64_t slot) const { return slot < last_ && slot + kKeys > first_; }
  SlotMask hidden(int64_t query, int64_t first) const {
    SlotMask bits = 0;
    for (int64_t row = 0; row < p_.K; ++row) {
      const int64_t j = p_.new_slot_of(b_, row) - first;
      if (j >= 0 && j < kKeys && !p_.shows(b_, query, row)) bits |= SlotMask(1) << j;
    }
    return bits;
  }

 private:
  const BlockAttentionParams& p_;
  const int64_t b_;
  int64_t first_, last_;  // range of their slots, if `visible` is given
};

}  // namespace
}  // namespace dlm::cpu
