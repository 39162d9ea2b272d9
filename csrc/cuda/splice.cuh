// SPDX-License-Identifier: Apache-2.0
// Inserts into and removes from a window of each row, in place. A block processes a row:
//   1. each thread keeps its slots in registers; a prefix sum over the slots says where they go
//   2. everything behind the window moves by the same distance, one position per thread at a time:
//      starting from the far end when it moves right, from the near end when it moves left, with
//      all reads of an iteration before its writes
//   3. the threads write their slots and the positions inserted before them, then freed positions
// A position is written once, by one thread, which finds its previous content there: this decides
// the dirty bit. Costs about 40 bytes per position from the window on, and the latency of the
// iterations. Needs sm_80.
#pragma once
#include "cuda/block.cuh"
#include "cuda/splice.h"

namespace dlm::cuda {

template <int kKeys>
class SpliceRow {
  // The content of a position, which moves with it.
  struct Content {
    int64_t token;
    uint32_t state;
    int32_t step;
    float confidence;
  };
  // Numbers of positions inserted and removed, added in a single word: a row has at most 2^12 slots
  // with fewer than 2^31 insertions each.
  static constexpr uint32_t kRemovedBits = 13;

 public:
  static constexpr SmemSize smem() { return SmemSize{}.take<uint64_t>(kMaxWarps); }

  DLM_DEVICE SpliceRow(const SpliceParams& p, SmemCarver& smem)
      : p_(p),
        row_(blockIdx.x),
        canvas_(int64_t(blockIdx.x) * p.T),
        slots_(int64_t(blockIdx.x) * p.W),
        totals_(smem.take<uint64_t>(kMaxWarps)),
        T_(int32_t(p.T)),
        start_(p.start[row_]),
        live_(clamped(p.length ? p.length[row_] : row_value(p.end, row_, T_))) {}

  DLM_DEVICE void run() {
    if (start_ < 0 || start_ > live_) return leave(0);  // block-uniform
    held_ = int32_t(min(p_.W, int64_t(live_ - start_)));
    read_slots();
    uint64_t total;
    uint64_t before = sums_before(total);
    const int64_t inserted = int64_t(total >> kRemovedBits);
    const int32_t removed = int32_t(total & ((1u << kRemovedBits) - 1));
    const int64_t result = live_ + inserted - removed;
    const int64_t limit = p_.length ? result : live_;
    if (limit > T_) return leave(limit - T_);  // block-uniform
    limit_ = int32_t(limit);

    shift_ = inserted - removed;
    move_rest();
    write_slots(before);
    const bool opens = p_.length == nullptr;
    const Content fill{opens ? p_.fill_token_id : p_.pad_token_id,
                       uint32_t(opens ? kStateOpen : kStateFrozen), -1, 0.0f};
    for (int64_t t = result + threadIdx.x; t < live_; t += blockDim.x) put(int32_t(t), -1, fill);
    keep_sources();
    if (threadIdx.x != 0) return;
    if (p_.length) p_.length[row_] = limit_;
    write_info(inserted, removed, result - limit);
  }

 private:
  DLM_DEVICE int32_t clamped(int32_t length) const { return max(0, min(length, T_)); }

  // Leaves the row unchanged.
  DLM_DEVICE void leave(int64_t missing) const {
    for (int32_t t = int32_t(threadIdx.x); t < T_; t += int32_t(blockDim.x))
      p_.source[canvas_ + t] = t;
    if (threadIdx.x == 0) write_info(0, 0, missing);
  }
  DLM_DEVICE void write_info(int64_t inserted, int32_t removed, int64_t overflow) const {
    int32_t* info = p_.info + int64_t(row_) * kSpliceColumns;
    info[kSpliceInserted] = int32_t(min(inserted, int64_t(INT32_MAX)));
    info[kSpliceRemoved] = removed;
    info[kSpliceOverflow] = int32_t(max(int64_t(0), min(overflow, int64_t(INT32_MAX))));
  }

  // Thread t has slots kKeys t and following.
  DLM_DEVICE int32_t slot(int k) const { return int32_t(threadIdx.x) * kKeys + k; }

  // Read twice rather than kept: registers are scarce.
  DLM_DEVICE int32_t inserts(int k) const {
    const int32_t w = slot(k);
    return p_.insert && w < p_.W && w <= live_ - start_ ? max(0, p_.insert[slots_ + w]) : 0;
  }

  // Sets content_ and leaves_ of this thread's slots.
  DLM_DEVICE void read_slots() {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int32_t w = slot(k);
      if (w >= held_) continue;
      content_[k] = content(start_ + w);
      const bool frozen = content_[k].state & kStateFrozen;
      leaves_ |= uint32_t(p_.remove && p_.remove[slots_ + w] && !frozen) << k;
    }
  }

  // Returns the sums over the slots before this thread's; `total` receives those over all slots.
  DLM_DEVICE uint64_t sums_before(uint64_t& total) const {
    uint64_t mine = uint64_t(__popc(leaves_));
#pragma unroll
    for (int k = 0; k < kKeys; ++k) mine += uint64_t(uint32_t(inserts(k))) << kRemovedBits;
    uint64_t upto = mine;
    const uint32_t lane = lane_index();
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, upto, distance);
      if (lane >= distance) upto += other;
    }
    if (lane == 31) totals_[warp_index()] = upto;
    // also: all slots are read before any position is written
    __syncthreads();
    uint64_t before = upto - mine;
    total = 0;
    for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
      if (w < warp_index()) before += totals_[w];
      total += totals_[w];
    }
    return before;
  }

  DLM_DEVICE Content content(int32_t t) const {
    const int64_t i = canvas_ + t;
    return {p_.tokens[i], p_.state ? p_.state[i] : 0u, p_.commit_step ? p_.commit_step[i] : 0,
            p_.commit_confidence ? p_.commit_confidence[i] : 0.0f};
  }

  // The new state of position t, which still holds its previous state, with this content.
  DLM_DEVICE uint32_t state_at(int32_t t, const Content& c) const {
    if (!p_.state) return 0;
    const uint32_t dirty =
        p_.tokens[canvas_ + t] != c.token ? kStateDirty : p_.state[canvas_ + t] & kStateDirty;
    return (c.state & ~uint32_t(kStateDirty)) | dirty;
  }
  DLM_DEVICE void store(int32_t t, int32_t source, const Content& c, uint32_t state) const {
    const int64_t i = canvas_ + t;
    p_.tokens[i] = c.token;
    if (p_.state) p_.state[i] = uint8_t(state);
    if (p_.commit_step) p_.commit_step[i] = c.step;
    if (p_.commit_confidence) p_.commit_confidence[i] = c.confidence;
    p_.source[i] = source;
  }
  DLM_DEVICE void put(int32_t t, int32_t source, const Content& c) const {
    store(t, source, c, state_at(t, c));
  }

  DLM_DEVICE void move_rest() const {
    if (shift_ == 0) return;
    const int32_t first = start_ + held_;
    const int64_t fits = limit_ - shift_;  // content from here on is dropped
    const int32_t count = int32_t(max(int64_t(0), min(int64_t(live_), fits) - first));
    const bool from_left = shift_ < 0;
    for (int32_t begin = 0; begin < count; begin += int32_t(blockDim.x)) {
      const int32_t i = begin + int32_t(threadIdx.x);
      const int32_t t = from_left ? first + i : first + count - 1 - i;
      Content c{};
      uint32_t state = 0;
      if (i < count) {
        c = content(t);
        state = state_at(int32_t(t + shift_), c);
      }
      __syncthreads();
      if (i < count) store(int32_t(t + shift_), t, c, state);
    }
  }

  DLM_DEVICE void write_slots(uint64_t before) const {
    const Content fill{p_.fill_token_id, kStateOpen, -1, 0.0f};
    // May exceed 2^31 beyond the limit.
    int64_t at = start_ + slot(0) + int64_t(before >> kRemovedBits) -
                 int64_t(before & ((1u << kRemovedBits) - 1));
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      for (int64_t end = at + inserts(k); at < end; ++at) {
        if (at >= limit_) return;
        put(int32_t(at), -1, fill);
      }
      if (slot(k) >= held_ || (leaves_ >> k & 1)) continue;
      if (at >= limit_) return;
      put(int32_t(at), start_ + slot(k), content_[k]);
      ++at;
    }
  }

  // Positions outside the changed range are their own sources.
  DLM_DEVICE void keep_sources() const {
    const int32_t end = shift_ == 0 ? start_ + held_ : max(limit_, live_);
    for (int32_t t = int32_t(threadIdx.x); t < T_; t += int32_t(blockDim.x)) {
      if (t < start_ || t >= end) p_.source[canvas_ + t] = t;
    }
  }

  const SpliceParams& p_;
  const uint32_t row_;
  const int64_t canvas_, slots_;  // where the row starts in [B,T] and [B,W]
  uint64_t* const totals_;
  const int32_t T_, start_, live_;
  int32_t held_ = 0;   // slots that are positions
  int32_t limit_ = 0;  // positions from here on receive no content
  int64_t shift_ = 0;
  Content content_[kKeys];
  uint32_t leaves_ = 0;  // bit k: this thread's k-th slot is removed
};

template <int kKeys>
__global__ void __launch_bounds__(kKeys == 1 ? 256 : 1024)
    splice_kernel(const __grid_constant__ SpliceParams p) {
  SmemCarver smem;
  SpliceRow<kKeys>(p, smem).run();
}

inline const char* why_not_splice(const SpliceParams& p) {
  return p.B > 0x7fffffff ? "tokens must have fewer than 2^31 rows" : nullptr;
}

inline cudaError_t start_splice(const SpliceParams& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  const dim3 grid(uint32_t(p.B));
  if (p.W <= 256) {
    return launch(splice_kernel<1>, grid, dim3(256), SpliceRow<1>::smem().bytes, stream, p);
  }
  return launch(splice_kernel<4>, grid, dim3(1024), SpliceRow<4>::smem().bytes, stream, p);
}

}  // namespace dlm::cuda
