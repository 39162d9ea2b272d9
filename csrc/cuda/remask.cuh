// SPDX-License-Identifier: Apache-2.0
// One commit / edit / remask / renoise step on a canvas. A block processes a row, in three passes:
//   1. one thread per slot writes the slot's position, by the last of the four masks that applies
//   2. all threads search the row for the first open position and the first end-of-sequence token,
//      with a few pairs of positions per thread in flight; if there is such a token, they search
//      the positions after it for given (frozen) ones, and after those for the next such token
//   3. if the row is complete up to that token, the tail is filled; changes are marked dirty
// A slot's own thread keeps the previous content of its position in shared memory, since registers
// are scarce. A row's positions are distinct if they ascend, which is checked first; otherwise they
// are sorted to find duplicates, so that no two threads write the same position. Pass 2 reads 9
// bytes per position (1 without end-of-sequence ids): with few rows its latency is the limit, with
// many the memory. Needs sm_80.
#pragma once
#include "common/philox.h"
#include "cuda/ptx.cuh"
#include "cuda/remask.h"
#include "cuda/sort.cuh"

namespace dlm::cuda {

// Maximum number of end-of-sequence ids that a launch can carry.
constexpr int64_t kMaxEosTokens = 64;

struct RemaskLaunch {
  RemaskParams op;
  int64_t eos[kMaxEosTokens];
  bool aligned;  // pairs of tokens and states can be read at once
};

// Threads per row: enough that each has at most four slots, and that a search of the row has all
// its reads in flight at once; more threads would only wait for each other.
struct CanvasBlock {
  int64_t slots, positions;
  uint32_t threads;
};
constexpr CanvasBlock kCanvasBlocks[] = {{128, 512, 64},
                                         {512, 2048, 128},
                                         {1024, 8192, 256},
                                         {2048, 32768, 512},
                                         {kMaxSlots, INT64_MAX, 1024}};

DLM_DEVICE bool is_open(uint32_t state) {
  return (state & (kStateOpen | kStateFrozen)) == kStateOpen;
}
DLM_DEVICE bool is_decided(uint32_t state) { return (state & (kStateOpen | kStateFrozen)) == 0; }
DLM_DEVICE bool asks(const uint8_t* mask, int64_t i) { return mask && mask[i]; }

template <int kKeys>
class RemaskRow {
  enum Partial {
    kRuns,
    kFirstEos,
    kFirstOpen,
    kOpen,
    kUsed,
    kWritten,
    kRewritten,
    kGiven,
    kEosBehind,
    kTail,
    kPartials
  };
  static constexpr uint32_t kLow = 1, kHigh = 1 << 16;  // a one in either half of a word
  static constexpr int kPairs = kKeys == 1 ? 4 : 2;  // of positions in flight; registers limit it

 public:
  static constexpr SmemSize smem(uint32_t threads) {
    return SmemSize{}
        .take<uint64_t>(threads * kKeys)
        .take<uint8_t>(threads * kKeys)
        .take<uint32_t>(kPartials * kMaxWarps);
  }

  DLM_DEVICE RemaskRow(const RemaskLaunch& launch, SmemCarver& smem)
      : p_(launch.op),
        launch_(launch),
        row_(blockIdx.x),
        slots_(int64_t(blockIdx.x) * p_.W),
        canvas_(int64_t(blockIdx.x) * p_.T),
        end_(end_of(p_, blockIdx.x)),
        tokens_(p_.tokens + canvas_),
        state_(p_.state + canvas_),
        exchange_(smem.take<uint64_t>(blockDim.x * kKeys)),
        lost_(smem.take<uint8_t>(blockDim.x * kKeys)),
        partial_(smem.take<uint32_t>(kPartials * kMaxWarps)),
        step_(p_.step ? p_.step[blockIdx.x] : 0) {}

  DLM_DEVICE void run() {
    read_positions();
    write_slots();
    __syncthreads();
    search();

    leave_partial<Sum>(used_, partial(kUsed));
    leave_partial<Sum>(written_, partial(kWritten));
    leave_partial<Sum>(rewritten_ | changed_slots(p_.T) << 16, partial(kRewritten));
    __syncthreads();
    uint32_t first_eos = gather_partials<Least>(partial(kFirstEos));
    const uint32_t first_open = gather_partials<Least>(partial(kFirstOpen));
    const uint32_t open = gather_partials<Sum>(partial(kOpen));
    const uint32_t used = gather_partials<Sum>(partial(kUsed));
    const uint32_t written = gather_partials<Sum>(partial(kWritten));
    const uint32_t rewritten = gather_partials<Sum>(partial(kRewritten));

    if (first_eos < Least::kNeutral) {
      const uint32_t given = block_reduce<Greatest>(given_behind(first_eos), partial(kGiven));
      if (given > 0) first_eos = block_reduce<Least>(eos_from(given), partial(kEosBehind));
    }
    const bool ends = first_eos < Least::kNeutral;
    const bool fill = p_.eos_policy == EosPolicy::kFill && ends && first_open > first_eos;
    mark_changes(fill ? first_eos : end_);
    uint32_t changed = rewritten >> 16;
    if (fill) {
      __syncthreads();
      const uint32_t mine = changed_slots(int64_t(first_eos) + 1) + fill_tail(first_eos + 1);
      changed = block_reduce<Sum>(mine, partial(kTail));
    }

    if (threadIdx.x != 0) return;
    int32_t* info = p_.info + int64_t(row_) * kInfoColumns;
    info[kInfoOpenWindow] = fill ? 0 : int32_t(used >> 16);
    info[kInfoOpen] = fill ? 0 : int32_t(open);
    info[kInfoCommitted] = int32_t(written & 0xffff);
    info[kInfoEdited] = int32_t(written >> 16);
    info[kInfoRemasked] = int32_t(rewritten & 0xffff);
    info[kInfoChanged] = int32_t(changed);
    info[kInfoFirstEos] = ends ? int32_t(first_eos) : -1;
    info[kInfoPrefix] = fill || first_open == Least::kNeutral ? int32_t(p_.T) : int32_t(first_open);
    info[kInfoDone] = fill || open == 0;
    if (p_.step && (used & 0xffff)) p_.step[row_] = step_ + 1;
  }

 private:
  DLM_DEVICE uint32_t* partial(Partial which) const { return partial_ + which * kMaxWarps; }
  DLM_DEVICE uint32_t slot(int k) const { return threadIdx.x + uint32_t(k) * blockDim.x; }
  // The previous token of a slot's position, and its current state, in the arrays of the sort,
  // which has finished.
  DLM_DEVICE int64_t& before(int k) const { return reinterpret_cast<int64_t*>(exchange_)[slot(k)]; }
  DLM_DEVICE uint8_t& after(int k) const { return lost_[slot(k)]; }
  DLM_DEVICE bool on_canvas(int32_t at) const { return at >= 0 && at < p_.T; }

  // Sets at_: canvas positions of this thread's slots, all distinct in the row, or -1.
  DLM_DEVICE void read_positions() {
    uint32_t runs = 0, disorder = 0;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t w = slot(k);
      const int32_t at = w < p_.W ? p_.position[slots_ + w] : -1;
      const int32_t left = w > 0 && w < p_.W ? p_.position[slots_ + w - 1] : -1;
      at_[k] = on_canvas(at) ? at : -1;
      runs += at_[k] >= 0 && !on_canvas(left);
      disorder += at_[k] >= 0 && on_canvas(left) && left >= at;
    }
    runs = block_reduce<Sum>(runs | disorder << 16, partial(kRuns));
    // A single ascending run of used slots is the usual window.
    if (runs > 1) drop_duplicates();
  }

  DLM_DEVICE void drop_duplicates() {
    uint64_t key[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t order = slot(k);
      key[k] = at_[k] >= 0 ? uint64_t(uint32_t(at_[k])) << 32 | order : ~uint64_t(0);
      lost_[slot(k)] = 0;
    }
    block_sort<kKeys>(key, exchange_);
    __syncthreads();
    exchange_[threadIdx.x] = key[kKeys - 1];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (k == 0 && threadIdx.x == 0) continue;
      const uint64_t left = k > 0 ? key[k > 0 ? k - 1 : 0] : exchange_[threadIdx.x - 1];
      const bool used = key[k] != ~uint64_t(0),
                 twice = uint32_t(left >> 32) == uint32_t(key[k] >> 32);
      const uint32_t order = uint32_t(key[k]);
      if (used && twice) lost_[order] = 1;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (lost_[slot(k)]) at_[k] = -1;
    }
  }

  DLM_DEVICE void write_slots() {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (at_[k] < 0) continue;
      before(k) = tokens_[at_[k]];
      after(k) = state_[at_[k]];
      used_ += kLow;
      if (uint32_t(at_[k]) >= end_) continue;
      if (!(after(k) & kStateFrozen)) write(k, slots_ + slot(k));
      if (is_open(after(k))) used_ += kHigh;
    }
  }

  // Slot i of the batch is this thread's k-th slot; its position is not frozen.
  DLM_DEVICE void write(int k, int64_t i) {
    const int32_t at = at_[k];
    const int64_t proposal = p_.proposal[i];
    const bool open = after(k) & kStateOpen, proposes = proposal >= 0;
    const bool commits = open && proposes && asks(p_.commit, i);
    if (asks(p_.renoise, i)) {
      reopen(k, noise(at));
    } else if (asks(p_.remask, i) && (commits || !open)) {
      reopen(k, p_.mask_token_id);
    } else if (asks(p_.edit, i) && !open && proposes && before(k) != proposal) {
      store(k, proposal, after(k) | kStateEdited);
      record_confidence(at, p_.confidence ? p_.confidence[i] : 0.0f);
      written_ += kHigh;
    } else if (commits) {
      store(k, proposal, after(k) & ~uint32_t(kStateOpen));
      if (p_.commit_step) p_.commit_step[canvas_ + at] = step_;
      record_confidence(at, p_.confidence ? p_.confidence[i] : 0.0f);
      written_ += kLow;
    }
  }

  DLM_DEVICE void store(int k, int64_t token, uint32_t state) {
    changed_ |= uint32_t(token != before(k)) << k;
    after(k) = uint8_t(state);
    tokens_[at_[k]] = token;
    state_[at_[k]] = uint8_t(state);
  }

  DLM_DEVICE void reopen(int k, int64_t token) {
    store(k, token, after(k) | kStateOpen);
    forget(at_[k]);
    rewritten_ += kLow;
  }

  // Resets the records to those of a position that no step has committed.
  DLM_DEVICE void forget(int64_t at) {
    if (p_.commit_step) p_.commit_step[canvas_ + at] = -1;
    record_confidence(at, 0.0f);
  }

  DLM_DEVICE void record_confidence(int64_t at, float confidence) {
    if (p_.commit_confidence) p_.commit_confidence[canvas_ + at] = confidence;
  }

  DLM_DEVICE int64_t noise(int32_t at) const {
    const uint32_t origin = uint32_t(row_value(p_.origin, row_, 0));
    const Philox4 bits = philox(uint64_t(row_value(p_.seed, row_, int64_t(0))),
                                uint32_t(at) - origin, uint32_t(step_), Stream::kRenoise, 0);
    return uniform_below(bits.word[0], uint32_t(p_.vocab_size));
  }

  // Canvas position after the row's last one; positions from there on do not belong to the request.
  static DLM_DEVICE uint32_t end_of(const RemaskParams& p, uint32_t row) {
    return uint32_t(min(max(int64_t(row_value(p.end, row, int32_t(p.T))), int64_t(0)), p.T));
  }

  // Stores the partial results of the search: first end-of-sequence token at a decided position,
  // first open position, number of open positions.
  DLM_DEVICE void search() {
    const uint32_t stride = 2 * blockDim.x;
    uint32_t first_eos = Least::kNeutral, first_open = Least::kNeutral, open = 0;
    for (uint32_t begin = 2 * threadIdx.x; begin < end_; begin += kPairs * stride) {
      int64_t token[kPairs][2];
      uint32_t state[kPairs][2];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) read_pair(begin + uint32_t(i) * stride, token[i], state[i]);
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const uint32_t t = begin + uint32_t(i / 2) * stride + uint32_t(i % 2);
        const uint32_t s = state[i / 2][i % 2];
        if (is_open(s)) {
          ++open;
          first_open = min(first_open, t);
        } else if (is_decided(s) && t < first_eos && is_eos(token[i / 2][i % 2])) {
          first_eos = t;
        }
      }
    }
    leave_partial<Least>(first_eos, partial(kFirstEos));
    leave_partial<Least>(first_open, partial(kFirstOpen));
    leave_partial<Sum>(open, partial(kOpen));
  }

  // Returns the position after this thread's last given position from `begin` on, or 0.
  DLM_DEVICE uint32_t given_behind(uint32_t begin) const {
    uint32_t given = 0;
#pragma unroll 1  // registers are scarce
    for (uint32_t t = begin + threadIdx.x; t < end_; t += blockDim.x) {
      if (state_[t] & kStateFrozen) given = t + 1;
    }
    return given;
  }

  // Returns this thread's first decided position from `begin` on, after everything given, that
  // holds an end-of-sequence token.
  DLM_DEVICE uint32_t eos_from(uint32_t begin) const {
#pragma unroll 1  // registers are scarce
    for (uint32_t t = begin + threadIdx.x; t < end_; t += blockDim.x) {
      if (!is_open(state_[t]) && is_eos(tokens_[t])) return t;
    }
    return Least::kNeutral;
  }

  // Reads positions t (even) and t + 1; those beyond the request read as frozen.
  DLM_DEVICE void read_pair(uint32_t t, int64_t (&token)[2], uint32_t (&state)[2]) const {
    token[0] = token[1] = 0;
    state[0] = state[1] = kStateFrozen;
    if (t >= end_) return;
    const bool wants_tokens = p_.eos_count > 0;
    if (launch_.aligned) {
      const uint32_t both = *reinterpret_cast<const uint16_t*>(state_ + t);
      state[0] = both & 0xff;
      if (t + 1 < end_) state[1] = both >> 8;
      if (!wants_tokens) return;
      const uint4 v = ptx::ld_global_16(tokens_ + t);
      token[0] = int64_t(uint64_t(v.y) << 32 | v.x);
      token[1] = int64_t(uint64_t(v.w) << 32 | v.z);
      return;
    }
    const bool whole = t + 1 < end_;
    state[0] = state_[t];
    if (whole) state[1] = state_[t + 1];
    if (!wants_tokens) return;
    token[0] = tokens_[t];
    if (whole) token[1] = tokens_[t + 1];
  }

  DLM_DEVICE bool is_eos(int64_t token) const {
    bool hit = false;
#pragma unroll 1
    for (int64_t i = 0; i < p_.eos_count; ++i) hit |= token == launch_.eos[i];
    return hit;
  }

  // Number of this thread's slots before position `end` whose token has changed.
  DLM_DEVICE uint32_t changed_slots(int64_t end) const {
    uint32_t n = 0;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) n += (changed_ >> k & 1) && at_[k] < end;
    return n;
  }

  // Marks the changed slots up to canvas position `last`; slots beyond get their previous token
  // back, for fill_tail to compare with.
  DLM_DEVICE void mark_changes(int64_t last) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (!(changed_ >> k & 1)) continue;
      if (at_[k] <= last) {
        state_[at_[k]] = uint8_t(after(k) | kStateDirty);
      } else {
        tokens_[at_[k]] = before(k);
      }
    }
  }

  // Returns how many tokens this thread changed.
  DLM_DEVICE uint32_t fill_tail(uint32_t begin) {
    uint32_t changed = 0;
#pragma unroll 1  // registers are scarce
    for (uint32_t t = begin + threadIdx.x; t < end_; t += blockDim.x) {
      uint32_t state = state_[t] & ~uint32_t(kStateOpen);
      forget(t);
      if (tokens_[t] != p_.fill_token_id) {
        tokens_[t] = p_.fill_token_id;
        state |= kStateDirty;
        ++changed;
      }
      state_[t] = uint8_t(state);
    }
    return changed;
  }

  const RemaskParams& p_;
  const RemaskLaunch& launch_;
  const uint32_t row_;
  const int64_t slots_, canvas_;  // where the row starts in [B,W] and [B,T]
  const uint32_t end_;
  int64_t* const tokens_;
  uint8_t* const state_;
  uint64_t* const exchange_;
  uint8_t* const lost_;
  uint32_t* const partial_;
  const int32_t step_;
  int32_t at_[kKeys];
  uint32_t changed_ = 0;  // bit k: this thread's k-th slot
  // Counts of at most kMaxSlots, two per word: used and open slots; committed and edited ones;
  // remasked ones and, later, changed ones.
  uint32_t used_ = 0, written_ = 0, rewritten_ = 0;
};

template <int kKeys>
__global__ void __launch_bounds__(1024) remask_kernel(const __grid_constant__ RemaskLaunch launch) {
  SmemCarver smem;
  RemaskRow<kKeys>(launch, smem).run();
}

inline const char* why_not_remask(const RemaskParams& p) {
  if (p.B > 0x7fffffff) return "tokens must have fewer than 2^31 rows";
  if (p.eos_count > kMaxEosTokens) return "eos_token_ids must have at most 64 ids";
  return nullptr;
}

inline cudaError_t start_remask(const RemaskParams& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  RemaskLaunch a{};
  a.op = p;
  for (int64_t i = 0; i < p.eos_count; ++i) a.eos[i] = p.eos_token_ids[i];
  a.op.eos_token_ids = nullptr;
  a.aligned = p.T % 2 == 0 && reinterpret_cast<uintptr_t>(p.tokens) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(p.state) % 2 == 0;

  const CanvasBlock* block = kCanvasBlocks;
  while (block->slots < p.W || block->positions < p.T) ++block;
  const dim3 grid(uint32_t(p.B)), threads(block -> threads);
  if (p.W <= block->threads) {
    return launch(remask_kernel<1>, grid, threads, RemaskRow<1>::smem(block->threads).bytes, stream,
                  a);
  }
  return launch(remask_kernel<4>, grid, threads, RemaskRow<4>::smem(block->threads).bytes, stream,
                a);
}

}  // namespace dlm::cuda
