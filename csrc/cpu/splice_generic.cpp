// SPDX-License-Identifier: Apache-2.0
// Inserts into and removes from a window of each row, in place. Everything behind the window moves
// by the same distance: starting from its far end when it moves right, from its near end when it
// moves left, so that nothing is overwritten before it has moved. Meanwhile the window itself is
// kept in a copy. Takes about two nanoseconds per position from the window on.
#include <algorithm>

#include "cpu/splice.h"

namespace dlm::cpu::generic {
namespace {

// The content of a position, which moves with it.
struct Content {
  int64_t token;
  uint8_t state;
  int32_t step;
  float confidence;
};

class Row {
 public:
  Row(const SpliceParams& p, int64_t row)
      : p_(p),
        row_(row),
        canvas_(row * p.T),
        start_(p.start[row]),
        live_(p.length ? p.length[row] : p.end.at(row, int32_t(p.T))) {}

  void run() {
    int32_t* info = p_.info + row_ * kSpliceColumns;
    std::fill_n(info, int(kSpliceColumns), 0);
    int32_t* source = p_.source + canvas_;
    for (int64_t t = 0; t < p_.T; ++t) source[t] = int32_t(t);
    if (start_ < 0 || start_ > live_) return;

    // Slots that are positions, plus the one at the end, which has nothing to remove.
    slots_ = std::min(p_.W, live_ - start_ + 1);
    held_ = std::min(p_.W, live_ - start_);
    int64_t inserted = 0, removed = 0;
    for (int64_t w = 0; w < slots_; ++w) {
      inserted += inserts(w);
      removed += leaves_[w] = removes(w);
    }
    const int64_t shift = inserted - removed, result = live_ + shift;
    limit_ = p_.length ? result : live_;
    if (limit_ > p_.T) {
      info[kSpliceOverflow] = int32_t(std::min<int64_t>(limit_ - p_.T, INT32_MAX));
      return;
    }
    for (int64_t w = 0; w < held_; ++w) window_[w] = content(start_ + w);
    move_rest(shift);
    write_window();
    const Content fill = inserted_content(p_.length == nullptr);
    for (int64_t t = result; t < live_; ++t) put(t, -1, fill);

    info[kSpliceInserted] = int32_t(std::min<int64_t>(inserted, INT32_MAX));
    info[kSpliceRemoved] = int32_t(removed);
    info[kSpliceOverflow] = int32_t(std::clamp<int64_t>(result - limit_, 0, INT32_MAX));
    if (p_.length) p_.length[row_] = int32_t(result);
  }

 private:
  int64_t inserts(int64_t w) const { return p_.insert ? p_.insert[row_ * p_.W + w] : 0; }
  bool removes(int64_t w) const {
    return w < held_ && p_.remove && p_.remove[row_ * p_.W + w] &&
           !(p_.state && p_.state[canvas_ + start_ + w] & kStateFrozen);
  }

  Content content(int64_t t) const {
    const int64_t i = canvas_ + t;
    return {p_.tokens[i], p_.state ? p_.state[i] : uint8_t(0),
            p_.commit_step ? p_.commit_step[i] : 0,
            p_.commit_confidence ? p_.commit_confidence[i] : 0.0f};
  }
  Content inserted_content(bool open) const {
    return open ? Content{p_.fill_token_id, kStateOpen, -1, 0.0f}
                : Content{p_.pad_token_id, kStateFrozen, -1, 0.0f};
  }

  // Writes content to position t, which still holds its previous state. The dirty bit describes the
  // keys and values of the position, so it stays.
  void put(int64_t t, int64_t source, const Content& c) {
    const int64_t i = canvas_ + t;
    if (p_.state) {
      const int dirty = p_.tokens[i] != c.token ? kStateDirty : p_.state[i] & kStateDirty;
      p_.state[i] = uint8_t((c.state & ~kStateDirty) | dirty);
    }
    p_.tokens[i] = c.token;
    if (p_.commit_step) p_.commit_step[i] = c.step;
    if (p_.commit_confidence) p_.commit_confidence[i] = c.confidence;
    p_.source[i] = int32_t(source);
  }

  void move_rest(int64_t shift) {
    const int64_t begin = start_ + held_;
    if (shift < 0) {
      for (int64_t t = begin; t < live_; ++t) put(t + shift, t, content(t));
    } else if (shift > 0) {
      for (int64_t t = std::min<int64_t>(live_, limit_ - shift); t-- > begin;)
        put(t + shift, t, content(t));
    }
  }

  void write_window() {
    const Content fill = inserted_content(true);
    int64_t at = start_;
    for (int64_t w = 0; w < slots_ && at < limit_; ++w) {
      for (int64_t n = inserts(w); n > 0 && at < limit_; --n) put(at++, -1, fill);
      if (w < held_ && !leaves_[w] && at < limit_) put(at++, start_ + w, window_[w]);
    }
  }

  const SpliceParams& p_;
  const int64_t row_, canvas_, start_, live_;
  int64_t slots_ = 0, held_ = 0;
  int64_t limit_ = 0;  // positions from here on are not written
  Content window_[kMaxSlots];
  bool leaves_[kMaxSlots];
};

}  // namespace

void splice(const SpliceParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) Row(p, b).run();
}

}  // namespace dlm::cpu::generic
