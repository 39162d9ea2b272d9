// SPDX-License-Identifier: Apache-2.0
// What the attention kernels of all element types share: the place of a block in the problem, what
// its rows may see, the walk over key tiles, and the pipeline that brings them to shared memory.
#pragma once
#include <climits>
#include <cmath>
#include <type_traits>

#include "common/params.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

// Faults that the native tests plant: each must be noticed.
enum class AttentionFault {
  kNone,
  kNoBarrierBeforeReuse,
  kLaxWait,
  kTailUnmasked,
  kSplitsOverlap,
  kNotRescaled,
  kZeroTimesNaN,
  kMergedTooEarly,
  kMaximaMixed,
  kFirstRowWins,
};

// Which kernel attends. kLiteral, of few rows, takes any scale and soft-cap: kernels of their own
// keep that out of the others' loops.
enum class AttendForm { kNarrow, kWide, kLiteral };

constexpr int kAttendThreads = 128;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A row is one query of one of the H/G heads that share a KV head: row r of a KV head is query
// r / group, head g * group + r % group.
struct AttendParams {
  BlockAttentionParams op;
  int32_t group, rows;  // H/G, Q * H/G
  int32_t row_tiles, splits, split_length;
  // Logits are kept in units of log 2: scale * q.k, or where cap > 0 cap * tanh(scale * q.k);
  // kLiteral goes by scale and soft-cap of the op.
  float scale, cap;
  AttendForm form;
  // Of several splits: [B*Q*H, splits, D] unnormalised sums; [B*Q*H, splits] maximum and sum of
  // weights.
  float* partial;
  float2* partial_norm;
};

// --- the place of a block ----------------------------------------------------------------------

struct Place {
  int64_t b;
  int32_t g, split, first_row;
};

// Row tiles of the same keys run side by side, so all but one find them in the L2 cache; the last
// first, since under causality it is the longest.
template <int kRows>
DLM_DEVICE Place place_of_block(const AttendParams& p) {
  uint32_t i = blockIdx.x;
  const uint32_t row_tile = uint32_t(p.row_tiles) - 1 - i % uint32_t(p.row_tiles);
  i /= uint32_t(p.row_tiles);
  const uint32_t split = i % uint32_t(p.splits);
  i /= uint32_t(p.splits);
  const uint32_t G = uint32_t(p.op.G);
  return {int64_t(i / G), int32_t(i % G), int32_t(split), int32_t(row_tile) * kRows};
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

// The slots that causality and the window leave to a query: [low, high), ranges and order apart.
DLM_DEVICE Interval visible_interval(const BlockAttentionParams& p, int64_t b, int32_t query) {
  const int64_t slot = p.slots ? p.slots[b * p.Q + query] : query;
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

// Of the rows of a tile, in shared memory.
struct RowLimits {
  int32_t *low, *high, *order;  // order: q_limit

  DLM_DEVICE void take(SmemCarver& smem, int rows) {
    low = smem.take<int32_t>(rows);
    high = smem.take<int32_t>(rows);
    order = smem.take<int32_t>(rows);
  }
  DLM_DEVICE void fill(const AttendParams& p, const Place& place, int rows) {
    for (int row = int(threadIdx.x); row < rows; row += kAttendThreads) {
      Interval sees{0, 0};
      int32_t limit = 0;
      if (place.first_row + row < p.rows) {
        const int32_t query = query_row(p, place, row).query;
        sees = visible_interval(p.op, place.b, query);
        if (p.op.q_limit) limit = p.op.q_limit[place.b * p.op.Q + query];
      }
      low[row] = sees.low;
      high[row] = sees.high;
      order[row] = limit;
    }
  }
};

// Of some rows: each sees within [first, last) alone, and all of [all_first, all_last); rows with
// empty intervals do not count.
struct Bounds {
  int32_t first, last, all_first, all_last;
};

// By a whole warp.
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

// Bits [low, high) of a word, clamped to it.
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
  int32_t slot;  // the first; -1: no tile
  Mask bits;     // slots that lie in a range and in what some row of the block may see
};

// The tiles of a split that hold a slot to be seen, ascending. Tiles and splits are counted from
// the first slot of the ranges, not of the cache: how far a request is padded on the left, and how
// large the cache is, changes no bit of its result.
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
  }

  // `overlap` is for the tests: slots of the next split that are taken too.
  DLM_DEVICE void confine(const Bounds& rows, int32_t split, int32_t split_length,
                          int64_t overlap = 0) {
    first_ = rows.first;
    last_ = 0;
    slot_ = 0;
    if (start_ == INT_MAX || rows.first >= rows.last) return;
    const int64_t origin = start_, begin = origin + int64_t(split) * split_length;
    last_ = int32_t(min(int64_t(rows.last), begin + split_length + overlap));
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
  // A range starts no earlier than the ranges before it end; behind the last: INT_MAX.
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
  int32_t start_ = 0, end_ = 0;  // the range that the walk has reached
  int32_t slot_ = 0, first_ = 0, last_ = 0;
};

// --- tiles in shared memory --------------------------------------------------------------------

// Byte offset of a 16-byte chunk in a tile whose rows have `chunks` of them, a multiple of 8: eight
// rows at one chunk, and eight chunks of one row, lie in different banks.
template <int chunks>
DLM_DEVICE uint32_t chunk_offset(int row, int chunk) {
  return uint32_t(row * chunks * 16 + chunk / 8 * 128 + ((chunk ^ row) & 7) * 16);
}

// The same in two parts, so that unrolled loops over constant even chunks keep one address: where
// a row's first chunk lies, or with `odd` its second; and from there, `chunk` chunks on.
template <int chunks>
DLM_DEVICE uint32_t row_start(uint32_t tile, int row, int odd) {
  return tile + uint32_t(row * chunks * 16 + ((row ^ odd) & 7) * 16);
}
DLM_DEVICE uint32_t chunk_from(uint32_t start, int chunk) {
  return (start ^ uint32_t((chunk & 7) * 16)) + uint32_t(chunk / 8 * 128);
}

// Starts copying the rows of a K or V tile whose bit is set; the others become zero: what nobody
// sees may hold anything.
template <class T, int kHeadDim, int kKeys>
DLM_DEVICE void load_keys(uint32_t to, const void* cache, int64_t stride,
                          const KeyTile<kKeys>& tile) {
  constexpr int kChunks = kHeadDim * int(sizeof(T)) / 16, kStep = kAttendThreads / kChunks;
  static_assert(kKeys % kStep == 0);
  const int row0 = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const T* from =
      static_cast<const T*>(cache) + (tile.slot + row0) * stride + chunk * (16 / int(sizeof(T)));
  const auto bits = tile.bits >> row0;
#pragma unroll
  for (int row = 0; row < kKeys; row += kStep) {
    ptx::cp_async_16(to + chunk_offset<kChunks>(row0 + row, chunk), from, bits >> row & 1);
    from += kStep * stride;
  }
}

// Starts copying the rows of q; those beyond the last become zero.
template <class T, int kHeadDim, int kRows>
DLM_DEVICE void load_queries(uint32_t to, const AttendParams& p, const Place& place) {
  constexpr int kChunks = kHeadDim * int(sizeof(T)) / 16, kStep = kAttendThreads / kChunks;
  static_assert(kRows % kStep == 0);
  const int row0 = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const T* q =
      static_cast<const T*>(p.op.q) + place.b * p.op.q_stride[0] + chunk * (16 / int(sizeof(T)));
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int row = row0 + i;
    const bool valid = place.first_row + row < p.rows;
    const QueryRow from = query_row(p, place, valid ? row : 0);
    ptx::cp_async_16(to + chunk_offset<kChunks>(row, chunk),
                     q + from.query * p.op.q_stride[1] + from.head * p.op.q_stride[2], valid);
  }
}

// compute(tile, address of its K tile; the V tile follows) for every tile of the walk. The copies
// of `stages` - 1 tiles are under way meanwhile; one barrier a tile both publishes what has landed
// and frees the stage that is loaded next. Copies that the caller has started and not committed
// land with the first tile.
template <class T, int kHeadDim, int kKeys, int stages, AttentionFault fault, class Compute>
DLM_DEVICE void for_each_key_tile(const AttendParams& p, const Place& place, KeyTiles<kKeys>& tiles,
                                  uint32_t ring, const Compute& compute) {
  constexpr uint32_t kTileBytes = kKeys * kHeadDim * sizeof(T), kStageBytes = 2 * kTileBytes;
  const BlockAttentionParams& op = p.op;
  const T* k = static_cast<const T*>(op.k_cache) + place.b * op.k_cache_stride[0] +
               place.g * op.k_cache_stride[2];
  const T* v = static_cast<const T*>(op.v_cache) + place.b * op.v_cache_stride[0] +
               place.g * op.v_cache_stride[2];
  const auto start = [&](const KeyTile<kKeys>& tile, int stage) {
    if (tile.slot >= 0) {
      const uint32_t at = ring + uint32_t(stage) * kStageBytes;
      load_keys<T, kHeadDim>(at, k, op.k_cache_stride[1], tile);
      load_keys<T, kHeadDim>(at + kTileBytes, v, op.v_cache_stride[1], tile);
    }
    ptx::cp_async_commit();  // empty groups too, so that a tile's group is always as far back
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
    ptx::cp_async_wait<fault == AttentionFault::kLaxWait ? stages - 1 : stages - 2>();
    if (fault != AttentionFault::kNoBarrierBeforeReuse) __syncthreads();
    const KeyTile<kKeys> tile = ahead[0];
#pragma unroll
    for (int i = 0; i + 2 < stages; ++i) ahead[i] = ahead[i + 1];
    ahead[stages - 2] = tiles.next();
    start(ahead[stages - 2], unused);
    compute(tile, ring + uint32_t(stage) * kStageBytes);
    unused = stage;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// --- logits, sums and results ------------------------------------------------------------------

DLM_DEVICE float capped(const AttendParams& p, float dot) {
  // tanh(x) = 1 - 2 / (1 + e^2x); the division is 0 where e^2x overflows
  const float x = dot * p.scale;
  return fmaf(-2.0f * p.cap, __fdividef(1.0f, ptx::exp2_approx(2.0f * kLog2E * x) + 1.0f), p.cap);
}

// The definition, step by step: for factors whose products and quotients are not normal floats, and
// for caps so high that `capped`, whose error is relative to the cap, is too coarse.
constexpr float kHighCap = 1024.0f;
DLM_DEVICE float literal_logit(const AttendParams& p, float dot) {
  const float x = dot * p.op.scale;
  return (p.op.softcap > 0.0f ? p.op.softcap * tanhf(x / p.op.softcap) : x) * kLog2E;
}

// Running maximum and sum of weights; weights are 2^(logit - maximum).
struct Norm {
  float maximum = -INFINITY, sum = 0.0f;
};
// What to subtract from logits: while only NaN and -inf were seen, any finite number will do.
DLM_DEVICE float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// A row that saw nothing has sum 0.
DLM_DEVICE float log_sum_exp(Norm norm) {
  return norm.sum == 0.0f ? -INFINITY : fmaf(base_of(norm.maximum), kLn2, logf(norm.sum));
}

// Result of a sum; + 0 since a sum that underflowed is +0 whichever sign it had before unseen slots
// added zeros.
DLM_DEVICE float normalised(float sum, Norm norm) {
  return norm.sum == 0.0f ? 0.0f : fmaf(sum, __frcp_rn(norm.sum), 0.0f);
}
template <class T>
DLM_DEVICE uint32_t pack(float low, float high) {
  return std::is_same_v<T, BFloat16> ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}

DLM_DEVICE uint4 as_words(float a, float b, float c, float d) {
  return make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d));
}
DLM_DEVICE float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

}  // namespace dlm::cuda
