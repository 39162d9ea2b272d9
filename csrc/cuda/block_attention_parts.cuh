// SPDX-License-Identifier: Apache-2.0
// What the attention kernels of all element types share: the place of a block in the problem, what
// its rows may see, the iteration over key tiles, and the pipeline that loads them to shared
// memory.
#pragma once
#include <climits>
#include <cmath>
#include <type_traits>

#include "common/params.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"

namespace dlm::cuda {

// Which kernel attends. kGeneral, for few rows, supports any scale and soft-cap, which keeps them
// out of the loops of the others.
enum class AttendForm { kNarrow, kWide, kGeneral };

constexpr int kAttendThreads = 128;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A row is one query of one of the H/G heads that share a KV head: row r of a KV head is query r /
// group, head g * group + r % group.
struct AttendParams {
  BlockAttentionParams op;
  int32_t group, rows;  // H/G, Q * H/G
  int32_t row_tiles, splits;
  bool spread;  // one split per block; otherwise a block processes all splits of its rows in order
  AttendForm form;
  float scale;  // log2(e) * scale, for forms other than kGeneral
  // With several splits, the unnormalized sums: if spread, [B*Q*H, splits, D]; otherwise [B*Q*H,
  // D], the sums that a block has added up so far.
  float* partial;
  float2* partial_norm;  // if spread: [B*Q*H, splits] maximum and sum of weights
  uint32_t* arrived;     // if spread: [B*G*row_tiles] number of finished blocks, initially 0
  // [B*Q, hidden_words], one bit per slot that `visible` hides from a query; null: none.
  uint32_t* hidden;
  int32_t hidden_words;
};

// The slots are divided into numerical splits: each has its own softmax, and they are merged in
// order. Their size is fixed, so that a request's bits depend neither on its batch nor on which
// block computes which split.
constexpr int32_t kSplitSlots = 256;

// --- the place of a block ----------------------------------------------------------------------

struct Place {
  int64_t b;
  int32_t g, first_row, row_tile;
  int32_t first_split, last_split;
  int32_t column_part;  // for wide heads, whose columns of v several blocks share
};

// Row tiles with the same keys run at the same time, so all but one find them in the L2 cache. The
// last one comes first, since under causality it is the longest.
template <int kRows, int kColumnParts = 1>
DLM_DEVICE Place place_of_block(const AttendParams& p) {
  uint32_t i = blockIdx.x;
  const auto next = [&](uint32_t count) {
    const uint32_t index = i % count;
    i /= count;
    return int32_t(index);
  };
  Place at{};
  at.column_part = next(kColumnParts);
  at.row_tile = p.row_tiles - 1 - next(uint32_t(p.row_tiles));
  at.first_row = at.row_tile * kRows;
  at.first_split = p.spread ? next(uint32_t(p.splits)) : 0;
  at.last_split = p.spread ? at.first_split + 1 : p.splits;
  at.g = next(uint32_t(p.op.G));
  at.b = i;
  return at;
}

struct QueryRow {
  int32_t query, head;
};
DLM_DEVICE QueryRow query_row(const AttendParams& p, const Place& place, int row) {
  const int32_t r = place.first_row + row;
  return {r / p.group, place.g * p.group + r % p.group};
}

// --- what a row may see ------------------------------------------------------------------------

struct Interval {
  int32_t low, high;
};

// The slots [low, high) that causality and the window leave visible to a query, before ranges and
// order.
DLM_DEVICE Interval visible_interval(const BlockAttentionParams& p, int64_t b, int32_t query) {
  const int64_t slot = p.slot_of(b, query);
  if (slot < 0 || slot >= p.S) return {0, 0};
  int64_t low = 0, high = p.S;
  if (p.causal_block > 0) {
    const int64_t origin = p.block_origin.at(b, 0);
    const int64_t block_end =
        slot < origin ? origin : slot - (slot - origin) % p.causal_block + p.causal_block;
    high = min(high, block_end);
  }
  if (p.window_left >= 0) low = max(low, slot - p.window_left);
  if (p.window_right >= 0) high = min(high, slot + p.window_right + 1);
  return {int32_t(low), int32_t(high)};
}

// The limits of the rows of a tile, in shared memory.
struct RowLimits {
  int32_t *low, *high, *query;

  DLM_DEVICE void take(SmemCarver& smem, int rows) {
    low = smem.take<int32_t>(rows);
    high = smem.take<int32_t>(rows);
    query = smem.take<int32_t>(rows);
  }
  DLM_DEVICE void fill(const AttendParams& p, const Place& place, int rows) {
    for (int row = int(threadIdx.x); row < rows; row += kAttendThreads) {
      Interval sees{0, 0};
      query[row] = 0;
      if (place.first_row + row < p.rows) {
        query[row] = query_row(p, place, row).query;
        sees = visible_interval(p.op, place.b, query[row]);
      }
      low[row] = sees.low;
      high[row] = sees.high;
    }
  }
};

// Whether k_order lets a query see a slot.
DLM_DEVICE bool is_in_order(const BlockAttentionParams& p, int64_t b, int32_t query, int32_t slot) {
  return !p.k_order || p.k_order[b * p.S + slot] <= p.q_limit[b * p.Q + query];
}

// Bit j: whether slot `first` + j is hidden from a query, if any may be.
template <class Mask>
DLM_DEVICE Mask hidden_slots(const AttendParams& p, int64_t b, int32_t query, int32_t first) {
  const uint32_t* words = p.hidden + (b * p.op.Q + query) * p.hidden_words + first / 32;
  uint64_t bits = uint64_t(words[1]) << 32 | words[0];
  bits >>= first % 32;
  if (sizeof(Mask) == 8 && first % 32 != 0) bits |= uint64_t(words[2]) << (64 - first % 32);
  return Mask(bits);
}

// Bounds of several rows: each sees only slots within [first, last), and all of [all_first,
// all_last); rows with empty intervals do not count.
struct Bounds {
  int32_t first, last, all_first, all_last;
};

// Must be called by a whole warp.
DLM_DEVICE Bounds bounds_of(const RowLimits& limits, int first_row, int rows) {
  Bounds all{INT_MAX, 0, 0, INT_MAX};
  for (int i = int(threadIdx.x) % 32; i < rows; i += 32) {
    const int32_t low = limits.low[first_row + i], high = limits.high[first_row + i];
    if (low >= high) continue;
    all = {min(all.first, low), max(all.last, high), max(all.all_first, low),
           min(all.all_last, high)};
  }
  return {__reduce_min_sync(~0u, all.first), __reduce_max_sync(~0u, all.last),
          __reduce_max_sync(~0u, all.all_first), __reduce_min_sync(~0u, all.all_last)};
}

// --- key tiles ---------------------------------------------------------------------------------

// A word with bits [low, high) set, clamped to the word.
template <class Mask>
DLM_DEVICE Mask bits_between(int32_t low, int32_t high) {
  constexpr int kBits = int(sizeof(Mask)) * 8;
  low = max(low, 0);
  high = min(high, kBits);
  return low < high ? Mask(~Mask(0)) >> (kBits - (high - low)) << low : 0;
}

template <int kKeys>
struct KeyTile {
  using Mask = std::conditional_t<(kKeys > 32), uint64_t, uint32_t>;
  static constexpr Mask kAll = Mask(~Mask(0)) >> (int(sizeof(Mask)) * 8 - kKeys);
  int32_t slot;  // the first slot; -1: no tile
  Mask bits;     // slots that lie in a range and that some row of the block may see
};

// Iterates in ascending order over the tiles of a split that contain a visible slot. Tiles and
// splits are counted from the first slot of the ranges, not of the cache: the amount of left
// padding and the size of the cache change no bit of a request's result.
template <int kKeys>
class KeyTiles {
 public:
  using Tile = KeyTile<kKeys>;

  DLM_DEVICE KeyTiles(const BlockAttentionParams& p, int64_t b)
      : ranges_(p.kv_range ? p.kv_range + b * p.N * 2 : nullptr),
        left_(p.kv_range ? int32_t(p.N) : 0),
        slots_(int32_t(p.S)) {
    if (ranges_) {
      next_range();
    } else {
      start_ = slots_ > 0 ? 0 : INT_MAX;
      end_ = slots_ > 0 ? slots_ : INT_MAX;
    }
    origin_ = start_;
  }

  // Restricts the tiles to what some of these rows see of a split; splits come in ascending order.
  // `length` is that of a split.
  DLM_DEVICE void confine(const Bounds& rows, int32_t split, int32_t length) {
    first_ = rows.first;
    last_ = 0;
    slot_ = 0;
    if (origin_ == INT_MAX || rows.first >= rows.last) return;
    const int64_t begin = int64_t(origin_) + int64_t(split) * length;
    last_ = int32_t(min(int64_t(rows.last), begin + length));
    const int64_t skipped = rows.first > begin ? (rows.first - begin) / kKeys * kKeys : 0;
    slot_ = int32_t(min(begin + skipped, int64_t(last_)));
  }

  DLM_DEVICE Tile next() {
    while (slot_ < last_) {
      while (end_ <= slot_) next_range();
      if (start_ >= slot_ + kKeys) slot_ += (start_ - slot_) / kKeys * kKeys;
      if (slot_ >= last_) break;
      const int32_t slot = slot_;
      slot_ += kKeys;
      typename Tile::Mask bits = bits_between<typename Tile::Mask>(start_ - slot, end_ - slot);
      while (end_ < slot + kKeys) {
        next_range();
        bits |= bits_between<typename Tile::Mask>(start_ - slot, end_ - slot);
      }
      bits &= bits_between<typename Tile::Mask>(first_ - slot, last_ - slot) & Tile::kAll;
      if (bits != 0) return {slot, bits};
    }
    return {-1, 0};
  }

 private:
  // A range starts no earlier than the ranges before it end; after the last one, start_ is INT_MAX.
  DLM_DEVICE void next_range() {
    int32_t reached = end_;
    while (left_ > 0) {
      const int32_t start = max(ranges_[0], reached), end = min(ranges_[1], slots_);
      reached = max(reached, end);
      ranges_ += 2;
      --left_;
      if (start < end) {
        start_ = start;
        end_ = end;
        return;
      }
    }
    start_ = end_ = INT_MAX;
  }

  const int32_t* ranges_;
  int32_t left_, slots_;
  int32_t origin_;               // the first slot of all ranges
  int32_t start_ = 0, end_ = 0;  // the current range
  int32_t slot_ = 0, first_ = 0, last_ = 0;
};

// --- tiles in shared memory --------------------------------------------------------------------

// Starts copying kColumns columns of those rows of a K or V tile whose bit is set. The other rows
// become zero, since slots that no row sees may hold anything, and so do the columns from D on.
template <class T, int kColumns, int kKeys>
DLM_DEVICE void load_keys(uint32_t to, const void* cache, int64_t stride, int32_t D,
                          const KeyTile<kKeys>& tile) {
  constexpr int kChunks = kColumns * int(sizeof(T)) / 16, kStep = kAttendThreads / kChunks;
  static_assert(kKeys % kStep == 0);
  const int row0 = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const int column = chunk * (16 / int(sizeof(T)));
  const T* from = static_cast<const T*>(cache) + (tile.slot + row0) * stride + column;
  const auto bits = column < D ? tile.bits >> row0 : 0;
#pragma unroll
  for (int row = 0; row < kKeys; row += kStep) {
    ptx::cp_async_16(to + chunk_offset<kChunks>(row0 + row, chunk), from, bits >> row & 1);
    from += kStep * stride;
  }
}

// Starts copying the rows of q. Rows beyond the last and columns beyond D become zero.
template <class T, int kHeadDim, int kRows>
DLM_DEVICE void load_queries(uint32_t to, const AttendParams& p, const Place& place) {
  constexpr int kChunks = kHeadDim * int(sizeof(T)) / 16, kStep = kAttendThreads / kChunks;
  static_assert(kRows % kStep == 0);
  const int row0 = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const int column = chunk * (16 / int(sizeof(T)));
  const T* q = static_cast<const T*>(p.op.q) + place.b * p.op.q_stride[0] + column;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int row = row0 + i;
    const bool valid = place.first_row + row < p.rows && column < int(p.op.D);
    const QueryRow from = query_row(p, place, valid ? row : 0);
    ptx::cp_async_16(to + chunk_offset<kChunks>(row, chunk),
                     q + from.query * p.op.q_stride[1] + from.head * p.op.q_stride[2], valid);
  }
}

// Calls compute(tile, address of its K tile, address of its V tile, which has kColumns columns) for
// every tile. Meanwhile the copies of `stages` - 1 tiles are in flight; one barrier per tile both
// publishes the data that has arrived and frees the stage that is loaded next. Copies that the
// caller has started but not committed arrive with the first tile.
template <class T, int kHeadDim, int kColumns, int kKeys, int stages, class Compute>
DLM_DEVICE void for_each_key_tile(const AttendParams& p, const Place& place, KeyTiles<kKeys>& tiles,
                                  uint32_t ring, const Compute& compute) {
  constexpr uint32_t kKeyBytes = kKeys * kHeadDim * sizeof(T);
  constexpr uint32_t kStageBytes = kKeyBytes + kKeys * kColumns * sizeof(T);
  const BlockAttentionParams& op = p.op;
  const int32_t D = int32_t(op.D), first_column = place.column_part * kColumns;
  const int32_t cached = int32_t(op.cache_row(place.b));
  const auto start = [&](const KeyTile<kKeys>& tile, int stage) {
    if (tile.slot >= 0) {
      const T* k = static_cast<const T*>(op.k_cache) + cached * op.k_cache_stride[0] +
                   place.g * op.k_cache_stride[2];
      const T* v = static_cast<const T*>(op.v_cache) + cached * op.v_cache_stride[0] +
                   place.g * op.v_cache_stride[2] + first_column;
      const uint32_t at = ring + uint32_t(stage) * kStageBytes;
      load_keys<T, kHeadDim>(at, k, op.k_cache_stride[1], D, tile);
      load_keys<T, kColumns>(at + kKeyBytes, v, op.v_cache_stride[1], D - first_column, tile);
    }
    ptx::cp_async_commit();  // also empty groups, so that a tile's group is always equally far back
  };

  KeyTile<kKeys> ahead[stages - 1];
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) {
    ahead[i] = tiles.next();
    start(ahead[i], i);
  }
  int stage = 0, unused = stages - 1;
#pragma unroll 1
  while (ahead[0].slot >= 0) {
    ptx::cp_async_wait<stages - 2>();
    __syncthreads();
    const KeyTile<kKeys> tile = ahead[0];
#pragma unroll
    for (int i = 0; i + 2 < stages; ++i) ahead[i] = ahead[i + 1];
    ahead[stages - 2] = tiles.next();
    start(ahead[stages - 2], unused);
    const uint32_t at = ring + uint32_t(stage) * kStageBytes;
    compute(tile, at, at + kKeyBytes);
    unused = stage;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// --- logits, sums and results ------------------------------------------------------------------

// The definition, step by step, in units of log 2, for any scale and soft-cap.
DLM_DEVICE float general_logit(const BlockAttentionParams& op, float dot) {
  const float x = dot * op.scale;
  return (op.softcap > 0.0f ? op.softcap * tanhf(x / op.softcap) : x) * kLog2E;
}

// Running maximum and sum of weights; weights are 2^(logit - maximum).
struct Norm {
  float maximum = -INFINITY, sum = 0.0f;
};
// The value to subtract from logits: while only NaN and -inf were seen, any finite number works.
DLM_DEVICE float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Merges the next split into the previous ones: sums of those already merged are multiplied by
// `total`, sums of the split by `part`. Splits that saw nothing, whose sum is 0, are skipped.
struct Fold {
  float total, part;
  DLM_DEVICE float operator()(float so_far, float next) const {
    return fmaf(next, part, so_far * total);
  }
};
DLM_DEVICE Fold fold(Norm& total, Norm next) {
  const float maximum = fmaxf(total.maximum, next.maximum), base = base_of(maximum);
  const Fold f{ptx::exp2_approx(total.maximum - base), ptx::exp2_approx(next.maximum - base)};
  total = {maximum, f(total.sum, next.sum)};
  return f;
}

// A row that saw nothing has sum 0.
DLM_DEVICE float log_sum_exp(Norm norm) {
  return norm.sum == 0.0f ? -INFINITY : fmaf(base_of(norm.maximum), kLn2, logf(norm.sum));
}

// Result of a sum; + 0 makes a sum that underflowed +0, whichever sign it had before unseen slots
// added zeros.
DLM_DEVICE float normalised(float sum, Norm norm) {
  return norm.sum == 0.0f ? 0.0f : fmaf(sum, __frcp_rn(norm.sum), 0.0f);
}
DLM_DEVICE int64_t out_row(const AttendParams& p, const Place& place, int row) {
  const QueryRow at = query_row(p, place, row);
  return (place.b * p.op.Q + at.query) * p.op.H + at.head;
}

// Writes four columns of a result.
template <class T>
DLM_DEVICE void store_out(const AttendParams& p, int64_t row, int column, const float4& sum,
                          Norm n) {
  const float x[4] = {normalised(sum.x, n), normalised(sum.y, n), normalised(sum.z, n),
                      normalised(sum.w, n)};
  T* out = static_cast<T*>(p.op.out) + row * p.op.D + column;
  if constexpr (std::is_same_v<T, float>) {
    ptx::st_global_16(out, as_words(x[0], x[1], x[2], x[3]));
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
  }
}

// Called by the block whose split was the last to finish: merges the splits of its rows, in order.
template <class T>
DLM_DEVICE void fold_splits(const AttendParams& p, const Place& place, int rows) {
  const int D = int(p.op.D), chunks = D / 4;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * chunks; i += kAttendThreads) {
    const int row = i / chunks, column = i % chunks * 4;
    if (place.first_row + row >= p.rows) break;
    const int64_t to = out_row(p, place, row), from = to * p.splits;
    Norm total;
    float4 sum{0, 0, 0, 0};
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) {
      const float2 norm = p.partial_norm[from + s];
      const float4 next = as_floats(ptx::ld_global_16(p.partial + (from + s) * D + column));
      if (norm.y == 0.0f) continue;
      const Fold f = fold(total, {norm.x, norm.y});
      sum = {f(sum.x, next.x), f(sum.y, next.y), f(sum.z, next.z), f(sum.w, next.w)};
    }
    store_out<T>(p, to, column, sum, total);
    if (column == 0) p.op.lse[to] = log_sum_exp(total);
  }
}

// Called by the whole block when it has stored its split: returns whether all splits of its rows
// are finished. `parts` is the number of blocks per split.
DLM_DEVICE bool is_last_to_arrive(const AttendParams& p, const Place& place, int parts,
                                  uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t tile = (place.b * p.op.G + place.g) * p.row_tiles + place.row_tile;
    *flag = ptx::atomic_add_acq_rel(p.arrived + tile, 1) + 1 == uint32_t(p.splits * parts);
  }
  __syncthreads();
  return *flag;
}

}  // namespace dlm::cuda
