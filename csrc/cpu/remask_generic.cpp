// SPDX-License-Identifier: Apache-2.0
// One commit / edit / remask / renoise step on a canvas, one row at a time, in three passes over
// the row:
//   1. each used slot writes its position, by the last of the four masks that applies to it
//   2. the row is searched for the first open position, and the positions after everything given
//      (frozen) for the first end-of-sequence token
//   3. if the row is complete up to that token, the tail is filled; changes are counted and marked
//      dirty
// The previous tokens are kept only for the slots: only slots and the tail can change. Pass 2 reads
// 1 byte of each given and 9 bytes of every other position, and dominates the cost: about a
// nanosecond per position.
#include <algorithm>

#include "common/philox.h"
#include "cpu/remask.h"

namespace dlm::cpu::generic {
namespace {

bool is_open(uint8_t state) { return (state & (kStateOpen | kStateFrozen)) == kStateOpen; }
bool is_decided(uint8_t state) { return (state & (kStateOpen | kStateFrozen)) == 0; }
bool asks(const uint8_t* mask, int64_t i) { return mask && mask[i]; }

class Row {
 public:
  Row(const RemaskParams& p, int64_t row)
      : p_(p),
        row_(row),
        end_(std::clamp<int64_t>(p.end.at(row, int32_t(p.T)), 0, p.T)),
        tokens_(p.tokens + row * p.T),
        state_(p.state + row * p.T),
        position_(p.position + row * p.W),
        info_(p.info + row * kInfoColumns) {}

  void run() {
    std::fill_n(info_, int(kInfoColumns), 0);
    const bool used = write_slots();
    if (used && p_.step) ++p_.step[row_];

    const int64_t first_eos = find_eos();
    const int64_t prefix = find_open();
    const bool fill = p_.eos_policy == EosPolicy::kFill && first_eos >= 0 && prefix > first_eos;
    mark_changes(fill ? first_eos : end_);
    if (fill) fill_tail(first_eos + 1);

    info_[kInfoOpenWindow] = fill ? 0 : open_in_window();
    info_[kInfoOpen] = fill ? 0 : open_from(prefix);
    info_[kInfoFirstEos] = int32_t(first_eos);
    info_[kInfoPrefix] = int32_t(fill ? p_.T : prefix);
    info_[kInfoDone] = info_[kInfoOpen] == 0;
  }

 private:
  // Returns whether any slot is used.
  bool write_slots() {
    bool used = false;
    for (int64_t w = 0; w < p_.W; ++w) {
      const int32_t at = position_[w];
      if (at < 0) continue;
      used = true;
      before_[w] = tokens_[at];
      if (at < end_ && !(state_[at] & kStateFrozen)) write(row_ * p_.W + w, at);
    }
    return used;
  }

  // Writes canvas position `at`, which is not frozen, from slot i of the batch.
  void write(int64_t i, int32_t at) {
    const bool open = state_[at] & kStateOpen, proposes = p_.proposal[i] >= 0;
    const bool commits = open && proposes && asks(p_.commit, i);
    if (asks(p_.renoise, i)) {
      reopen(at, noise(at));
    } else if (asks(p_.remask, i) && (commits || !open)) {
      reopen(at, p_.mask_token_id);
    } else if (asks(p_.edit, i) && !open && proposes && tokens_[at] != p_.proposal[i]) {
      tokens_[at] = p_.proposal[i];
      state_[at] |= kStateEdited;
      record_confidence(i, at);
      ++info_[kInfoEdited];
    } else if (commits) {
      tokens_[at] = p_.proposal[i];
      state_[at] &= uint8_t(~kStateOpen);
      if (p_.commit_step) p_.commit_step[row_ * p_.T + at] = step();
      record_confidence(i, at);
      ++info_[kInfoCommitted];
    }
  }

  void reopen(int32_t at, int64_t token) {
    tokens_[at] = token;
    state_[at] |= kStateOpen;
    forget(at);
    ++info_[kInfoRemasked];
  }

  // Resets the records to those of a position that no step has committed.
  void forget(int64_t at) {
    if (p_.commit_step) p_.commit_step[row_ * p_.T + at] = -1;
    if (p_.commit_confidence) p_.commit_confidence[row_ * p_.T + at] = 0.0f;
  }

  void record_confidence(int64_t i, int32_t at) {
    if (p_.commit_confidence) p_.commit_confidence[row_ * p_.T + at] = p_.confidence[i];
  }

  int64_t noise(int32_t at) const {
    const uint32_t position = uint32_t(at) - uint32_t(p_.origin.at(row_, 0));
    const Philox4 bits =
        philox(uint64_t(p_.seed.at(row_, 0)), position, uint32_t(step()), Stream::kRenoise, 0);
    return uniform_below(bits.word[0], uint32_t(p_.vocab_size));
  }

  int32_t step() const { return p_.step ? p_.step[row_] : 0; }

  // First decided position after everything given that holds an end-of-sequence token, or -1.
  // Searches for one id at a time: a tight loop that stops where an earlier id was found.
  int64_t find_eos() const {
    int64_t given = end_;
    while (given > 0 && !(state_[given - 1] & kStateFrozen)) --given;
    int64_t first = end_;
    for (int64_t k = 0; k < p_.eos_count; ++k) {
      const int64_t id = p_.eos_token_ids[k];
      int64_t t = given;
      while (t < first && !(tokens_[t] == id && is_decided(state_[t]))) ++t;
      first = t;
    }
    return first < end_ ? first : -1;
  }

  // First open position, or T.
  int64_t find_open() const {
    int64_t t = 0;
    while (t < end_ && !is_open(state_[t])) ++t;
    return t < end_ ? t : p_.T;
  }

  int32_t open_from(int64_t t) const {
    int32_t open = 0;
    for (; t < end_; ++t) open += is_open(state_[t]);
    return open;
  }

  int32_t open_in_window() const {
    int32_t open = 0;
    for (int64_t w = 0; w < p_.W; ++w) {
      const int32_t at = position_[w];
      open += at >= 0 && at < end_ && is_open(state_[at]);
    }
    return open;
  }

  // Compares the slots up to canvas position `last` with their previous tokens; slots beyond get
  // theirs back, for fill_tail to compare with.
  void mark_changes(int64_t last) {
    for (int64_t w = 0; w < p_.W; ++w) {
      const int32_t at = position_[w];
      if (at < 0 || tokens_[at] == before_[w]) continue;
      if (at > last) {
        tokens_[at] = before_[w];
      } else {
        mark_changed(at);
      }
    }
  }

  void fill_tail(int64_t begin) {
    for (int64_t t = begin; t < end_; ++t) {
      state_[t] &= uint8_t(~kStateOpen);
      forget(t);
      if (tokens_[t] == p_.fill_token_id) continue;
      tokens_[t] = p_.fill_token_id;
      mark_changed(t);
    }
  }

  void mark_changed(int64_t at) {
    state_[at] |= kStateDirty;
    ++info_[kInfoChanged];
  }

  const RemaskParams& p_;
  const int64_t row_, end_;
  int64_t* tokens_;
  uint8_t* state_;
  const int32_t* position_;
  int32_t* info_;
  int64_t before_[kMaxSlots];
};

}  // namespace

void remask(const RemaskParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) Row(p, b).run();
}

}  // namespace dlm::cpu::generic
