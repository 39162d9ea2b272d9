// SPDX-License-Identifier: Apache-2.0
// Token, probability and statistics of each row of logits. For all v but the argmax,
//   x_v = (z_v - max) / T,   S = sum of e^x_v,   X = sum of x_v e^x_v
// scan: a block takes a tile of a row (32 KiB, 8 chunks of 16 bytes a thread), copies it to shared
// memory, finds the maximum, leaves the argmax out, adds up S and X; where a token is to be drawn,
// each warp adds up chunks of 256 logits and races them (common/race.h). finish: a warp takes a
// row, joins its tiles, in double, in a fixed order, and races the tokens of the chunk that won.
// Tiles depend on V and the element type alone, so a row's bits do not depend on the batch. A
// second kernel, not the last block to arrive, needs no counter that somebody must have cleared.
// Filtered rows: token_confidence_filter.cuh finds their floors in between, and they are scanned
// again, from L2. Other rows are read once: V elements; 9 PTX instructions a logit in the two loops
// over a tile are meant to take less time than the loads; rows that draw take some 25 more. Needs
// sm_80.
#pragma once
#include <type_traits>

#include "common/order.h"
#include "common/race.h"
#include "cuda/chunk_sum.cuh"
#include "cuda/token_confidence.h"
#include "cuda/token_confidence_filter.cuh"

namespace dlm::cuda {

// A block works for about as long as its loads take; six of them fit an SM of 228 KiB, so that most
// have loads under way while others compute. (Four where logits are adjusted, for their registers.)
constexpr uint32_t kScanThreads = 256, kScanChunks = 8, kScanWarps = kScanThreads / 32;
constexpr uint32_t kFinishRows = 4;  // warps of a block of the second kernel

// Guided or biased logits are kept as floats.
template <class T, bool adjusted>
using Stored = std::conditional_t<adjusted, float, T>;
template <class T, bool adjusted>
constexpr uint32_t kTile = kScanThreads * kScanChunks * kPerChunk<Stored<T, adjusted>>;

// A random word of a row.
DLM_DEVICE uint32_t random_word(const RandomKey& random, uint32_t n, Stream stream,
                                uint32_t index) {
  const Stream own = redrawn(stream, uint32_t(row_value(random.redraw, n, 0)));
  return word_of(
      philox(uint64_t(row_value(random.seed, n, int64_t(0))), uint32_t(random.position[n]),
             uint32_t(row_value(random.step, n, 0)), own, index / 4),
      index);
}

template <class T, bool adjusted>
class TileScan {
  using S = Stored<T, adjusted>;
  static constexpr uint32_t kChunk = kPerChunk<S>, kLoad = kPerChunk<T>, kSpread = kLoad / kChunk;
  static constexpr uint32_t kLogits = kTile<T, adjusted>;
  // Slots of a thread that a warp's chunk takes; where they are loaded one by one, the chunk's two
  // halves lie in them.
  static constexpr uint32_t kSlots = 8 / kChunk;
  static constexpr bool kTwoRuns = kSlots > kSpread;

  // Of a thread, then of a warp, then of the tile. Ordered bits (common/order.h) for floats.
  struct Found {
    float weight, exponent;        // S and X / ln 2
    uint32_t rest, count, argmax;  // largest but for the maximum; how many are it; the first one
    uint32_t key, chunk, flags;
  };

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<uint4>(kScanThreads * kScanChunks + 1)
        .template take<uint32_t>(kMaxWarps)
        .template take<Found>(kScanWarps);
  }

  DLM_DEVICE TileScan(const ConfidenceLaunch& job, SmemCarver& smem)
      : job_(job),
        tile_(smem.take<uint4>(kScanThreads * kScanChunks + 1)),
        partial_(smem.take<uint32_t>(kMaxWarps)),
        of_warp_(smem.take<Found>(kScanWarps)),
        n_(blockIdx.x / job.tiles),
        begin_((blockIdx.x - n_ * job.tiles) * kLogits),
        plan_(job.p, n_) {}

  DLM_DEVICE void run() {
    if (!plan_.used() || (job_.refining && !plan_.filters)) return;  // the whole block
    if (plan_.filters && !job_.refining)
      clear_search(job_.searches[n_], begin_ / kLogits, job_.tiles);
    const LogitsRow<T> row(job_.p, n_, plan_.source);
    if (adjusted) {
      adjust(row);
    } else {
      copy(row);
    }
    float mine = largest();
    if (!(mine <= kLargestFloat)) mine = replace_nan();
    if (leave_out(row)) mine = largest();

    leave_partial<Greatest>(ordered_bits(mine), partial_);
    __syncthreads();
    const float tile_max = ordered_value(gather_partials<Greatest>(partial_));

    Found found{0.0f, 0.0f, 0, 0, kNone, 0, kNone, flags_};
    const bool after_filter = job_.refining || !plan_.filters;
    if (tile_max > -INFINITY) {
      if (plan_.samples && after_filter) race(found);
      if (mine == tile_max) mine = take_maximum(tile_max, found);
      if (describes()) add_up(fminf(tile_max, kLargestFloat), found);
    }
    found.rest = ordered_bits(mine);
    found = over_block(found);
    if (threadIdx.x == 0) write(tile_max, found);
  }

 private:
  static constexpr uint32_t kNone = 0xffffffffu;

  // Whether this scan sees the distribution that the statistics are about.
  DLM_DEVICE bool describes() const { return job_.refining == (plan_.filters && plan_.about_kept); }

  // Slots are thread-private, a chunk of T fills kSpread of them in turn. A warp's threads have
  // chunk i / kSlots * kScanWarps + warp_index() of the tile's chunks of 256 logits in slot i (and
  // its neighbours).
  DLM_DEVICE uint32_t load_index(uint32_t i) const {
    if (kTwoRuns) return ((i / 2 * kScanWarps + warp_index()) * 2 + i % 2) * 32 + lane_index();
    return i / kSpread * kScanThreads + threadIdx.x;
  }
  DLM_DEVICE uint32_t first_id(uint32_t i) const {
    return begin_ + load_index(i) * kLoad + i % kSpread * kChunk;
  }
  DLM_DEVICE uint32_t slot(uint32_t i) const {
    return kTwoRuns ? load_index(i) : i * kScanThreads + threadIdx.x;
  }
  DLM_DEVICE uint32_t address(uint32_t i) const { return ptx::smem_address(tile_ + slot(i)); }
  DLM_DEVICE uint4 chunk(uint32_t i) const { return ptx::ld_shared_16(address(i)); }
  DLM_DEVICE S* elements(uint32_t i) const { return reinterpret_cast<S*>(tile_ + slot(i)); }

  // Copies whole chunks of memory, from the one that holds the tile's first byte; a tile that
  // starts within a chunk is then moved into place.
  DLM_DEVICE void copy(const LogitsRow<T>& row) {
    const uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(row.logits) % 16);
    const int64_t lead = shift / sizeof(T);
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) copy_chunk(row, first_id(i) - lead, address(i));
    if (shift != 0 && threadIdx.x == 0)
      copy_chunk(row, int64_t(begin_) + kLogits - lead, address(kScanChunks));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    if (shift == 0) return;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) {  // from the first to the last, whose-ever they are
      const uint32_t to = ptx::smem_address(tile_ + i * kScanThreads + threadIdx.x);
      const uint4 moved = across(ptx::ld_shared_16(to), ptx::ld_shared_16(to + 16), shift);
      __syncthreads();
      ptx::st_shared_16(to, moved);
    }
    if (kTwoRuns) __syncthreads();
  }
  DLM_DEVICE void copy_chunk(const LogitsRow<T>& row, int64_t first, uint32_t to) {
    if (first >= 0 && first + kLoad <= row.V) {
      ptx::cp_async_16(to, row.logits + first);
    } else {
      ptx::st_shared_16(to, edge_chunk(row.logits, first, row.V));
    }
  }

  DLM_DEVICE void adjust(const LogitsRow<T>& row) {
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; i += kSpread) {
      float z[kLoad];
      row.values(first_id(i), z, flags_);
#pragma unroll
      for (uint32_t c = 0; c < kSpread; ++c) {
        ptx::st_shared_16(address(i + c),
                          make_uint4(float_to_bits(z[4 * c]), float_to_bits(z[4 * c + 1]),
                                     float_to_bits(z[4 * c + 2]), float_to_bits(z[4 * c + 3])));
      }
    }
  }

  DLM_DEVICE float largest() const {
    uint32_t largest = Word<S>::kMinusInfinity;
#pragma unroll 4
    for (uint32_t i = 0; i < kScanChunks; ++i) {
      const uint4 v = chunk(i);
      largest = Word<S>::larger(
          Word<S>::larger(Word<S>::larger(v.x, v.y), Word<S>::larger(v.z, v.w)), largest);
    }
    return Word<S>::largest(largest);
  }

  // Makes -inf of this thread's logits, unless keep(z, id).
  template <class Keep>
  DLM_DEVICE void edit(Keep keep) {
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) {
      const uint4 v = chunk(i);
      uint32_t words[4] = {v.x, v.y, v.z, v.w};
      const uint32_t id = first_id(i);
#pragma unroll
      for (uint32_t j = 0; j < kChunk; ++j) {
        uint32_t& word = words[j / Word<S>::kElements];
        const uint32_t index = j % Word<S>::kElements;
        if (!keep(Word<S>::value(word, index), id + j)) word = without<S>(word, index);
      }
      ptx::st_shared_16(address(i), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }

  // +inf may stay: it is the maximum then, and read as the largest float.
  DLM_DEVICE float replace_nan() {
    edit([&](float z, uint32_t) {
      if (!(z <= kLargestFloat)) flags_ |= z != z ? kFlagNaN : kFlagPosInf;
      return z == z;
    });
    return largest();
  }

  // Bans, bitmask, floor; whether there are any for this thread.
  DLM_DEVICE bool leave_out(const LogitsRow<T>& row) {
    bool any = false;
    row.each_banned(begin_, kLogits, [&](uint32_t offset) {
      const uint32_t load = offset / kLoad, within = offset % kLoad;
      const uint32_t warp = load / (kTwoRuns ? 64 : 32) % kScanWarps;
      if (warp * 32 + load % 32 != threadIdx.x) return;
      const uint32_t turn = load / kScanThreads;
      const uint32_t i = kTwoRuns ? turn / 2 * 2 + load / 32 % 2 : turn * kSpread + within / kChunk;
      elements(i)[within % kChunk] = from_float<S>(-INFINITY);
      any = true;
    });
    if (row.has_bitmask()) {
      edit([&](float, uint32_t id) { return row.allowed(id / 4 * 4) >> id % 4 & 1; });
      any = true;
    }
    if (job_.refining) {
      const float floor = job_.floor(n_);
      edit([&](float z, uint32_t) { return fminf(z, kLargestFloat) >= floor; });
      any = true;
    }
    return any;
  }

  // The largest key of this warp's chunks; a lane makes that of one of them.
  DLM_DEVICE void race(Found& found) const {
    const RandomKey& random = job_.p.random;
    float largest = -INFINITY, sum = 1.0f;  // of the chunk that is this lane's
#pragma unroll 1
    for (uint32_t c = 0; c < kScanChunks / kSlots; ++c) {
      float x[8], top = -INFINITY;
#pragma unroll
      for (uint32_t i = 0; i < kSlots; ++i) {
        const uint4 v = chunk(c * kSlots + i);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (uint32_t j = 0; j < kChunk; ++j) {
          const float z = Word<S>::value(words[j / Word<S>::kElements], j % Word<S>::kElements);
          x[i * kChunk + j] = fminf(z, kLargestFloat);
          top = fmaxf(top, x[i * kChunk + j]);
        }
      }
      top = ordered_value(__reduce_max_sync(kAllLanes, ordered_bits(top)));
      if (!(top > -INFINITY)) continue;  // the whole warp
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) x[j] = chunk_weight(x[j], top, plan_.inverse);
      const float total = chunk_sum_over_warp<kTwoRuns>(x);
      if (lane_index() != c) continue;
      largest = top;
      sum = total;
    }
    if (!(largest > -INFINITY)) return;
    found.chunk = begin_ / kRaceChunk + lane_index() * kScanWarps + warp_index();
    const uint32_t word = random_word(random, n_, Stream::kChunk, found.chunk);
    found.key = ordered_bits(chunk_key(largest, plan_.inverse, sum, word));
  }

  // Leaves the maximum out, wherever this thread has it; returns the largest of the others.
  DLM_DEVICE float take_maximum(float tile_max, Found& found) {
    edit([&](float z, uint32_t id) {
      if (z < tile_max) return true;
      found.count += 1;
      found.argmax = min(found.argmax, id);
      return false;
    });
    return largest();
  }

  DLM_DEVICE void add_up(float max, Found& found) const {
    const float scale = (job_.p.distribution == Distribution::kRaw ? 1.0f : plan_.inverse) *
                        1.44269504f;  // to powers of two
    float weight[2] = {0.0f, 0.0f}, exponent[2] = {0.0f, 0.0f};
#pragma unroll 2
    for (uint32_t i = 0; i < kScanChunks; ++i) {
      const uint4 v = chunk(i);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (uint32_t j = 0; j < kChunk; ++j) {
        const float z = Word<S>::value(words[j / Word<S>::kElements], j % Word<S>::kElements);
        // Differences first: a product of its own could overflow. 2^-127 counts as zero, so -inf
        // weighs nothing in either sum.
        const float x = fmaxf((z - max) * scale, -127.0f);
        const float w = ptx::exp2_approx(x);
        weight[j % 2] += w;
        exponent[j % 2] = __fmaf_rn(x, w, exponent[j % 2]);
      }
    }
    found.weight = weight[0] + weight[1];
    found.exponent = exponent[0] + exponent[1];
  }

  static DLM_DEVICE Found over_warp(Found f) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      f.weight += __shfl_xor_sync(kAllLanes, f.weight, distance);
      f.exponent += __shfl_xor_sync(kAllLanes, f.exponent, distance);
    }
    f.rest = __reduce_max_sync(kAllLanes, f.rest);
    f.count = __reduce_add_sync(kAllLanes, f.count);
    f.argmax = __reduce_min_sync(kAllLanes, f.argmax);
    f.flags = __reduce_or_sync(kAllLanes, f.flags);
    const uint32_t key = __reduce_max_sync(kAllLanes, f.key);
    f.chunk = __reduce_min_sync(kAllLanes, f.key == key ? f.chunk : kNone);
    f.key = key;
    return f;
  }
  DLM_DEVICE Found over_block(Found f) const {
    f = over_warp(f);
    if (lane_index() == 0) of_warp_[warp_index()] = f;
    __syncthreads();
    if (warp_index() != 0) return f;
    f = lane_index() < kScanWarps ? of_warp_[lane_index()]
                                  : Found{0.0f, 0.0f, 0, 0, kNone, 0, kNone, 0};
    return over_warp(f);
  }

  DLM_DEVICE void write(float tile_max, const Found& found) const {
    TilePart* out = job_.parts + blockIdx.x;
    if (describes()) {
      TilePart part;
      part.max = fminf(tile_max, kLargestFloat);
      part.second = found.count > 1 ? part.max : fminf(ordered_value(found.rest), kLargestFloat);
      part.weight = found.count > 1 ? found.weight + float(found.count - 1) : found.weight;
      part.exponent = found.exponent * 0.693147181f;
      part.argmax = found.argmax;
      part.flags = found.flags;
      part.key = found.key;
      part.chunk = found.chunk;
      *out = part;
    } else if (job_.refining) {  // only the sample is about the kept logits
      out->key = found.key;
      out->chunk = found.chunk;
    } else {  // only what the filter asks for
      out->max = fminf(tile_max, kLargestFloat);
    }
  }

  const ConfidenceLaunch& job_;
  uint4* const tile_;
  uint32_t* const partial_;
  Found* const of_warp_;
  const uint32_t n_, begin_;
  const RowPlan plan_;
  uint32_t flags_ = 0;
};

template <class T, bool adjusted>
__global__ void __launch_bounds__(kScanThreads, adjusted ? 4 : 6)
    scan_tiles_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  TileScan<T, adjusted>(job, smem).run();
}

DLM_DEVICE double sum_over_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// By one warp: the token with the largest key of the chunk that has won, in which there is one.
template <class T>
DLM_DEVICE uint32_t race_tokens(const ConfidenceLaunch& job, uint32_t n, const RowPlan& plan,
                                uint32_t chunk) {
  const LogitsRow<T> row(job.p, n, plan.source);
  const float floor = plan.filters ? job.floor(n) : -INFINITY;
  const uint32_t first = chunk * kRaceChunk + lane_index() * (kRaceChunk / 32);
  uint32_t best = 0, token = 0xffffffffu;
#pragma unroll 1
  for (uint32_t id = first; id < first + kRaceChunk / 32 && id < row.V; ++id) {
    const float z = row.at(id);
    if (!(z > -INFINITY) || z < floor) continue;
    const uint32_t word = random_word(job.p.random, n, Stream::kToken, id);
    const uint32_t key = ordered_bits(token_key(z, plan.inverse, word));
    if (key <= best) continue;
    best = key;
    token = id;
  }
  const uint32_t largest = __reduce_max_sync(kAllLanes, best);
  return __reduce_min_sync(kAllLanes, best == largest ? token : 0xffffffffu);
}

// By one warp.
template <class T>
DLM_DEVICE void finish_row(const ConfidenceLaunch& job, uint32_t n) {
  const TokenConfidenceParams& p = job.p;
  const RowPlan plan(p, n);
  const uint32_t lane = lane_index();
  int64_t token = -1, argmax = -1;
  uint32_t flags = 0;
  double confidence = -INFINITY, margin = 0.0, entropy = 0.0, logsumexp = -INFINITY, p_given = 0.0;

  if (plan.used()) {
    constexpr uint32_t kNone = 0xffffffffu;
    const TilePart* parts = job.parts + int64_t(n) * job.tiles;
    const uint32_t tiles = job.tiles;
    uint32_t top = 0, key = 0;
    for (uint32_t i = lane; i < tiles; i += 32) {
      top = max(top, ordered_bits(parts[i].max));
      key = max(key, parts[i].key);
      flags |= parts[i].flags;
    }
    top = __reduce_max_sync(kAllLanes, top);
    key = __reduce_max_sync(kAllLanes, key);
    flags = __reduce_or_sync(kAllLanes, flags);
    const float max_logit = ordered_value(top);

    uint32_t first = kNone, chunk = kNone;
    for (uint32_t i = lane; i < tiles; i += 32) {
      if (parts[i].max == max_logit) first = min(first, parts[i].argmax);
      if (parts[i].key == key) chunk = min(chunk, parts[i].chunk);
    }
    first = __reduce_min_sync(kAllLanes, first);
    chunk = __reduce_min_sync(kAllLanes, chunk);

    if (first == kNone) {
      flags |= kFlagNothingAllowed;
    } else {
      const double scale =
          p.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(plan.temperature);
      const auto exponent = [&](float logit) { return (double(logit) - max_logit) * scale; };
      double weight = 0.0, weighted_exponent = 0.0;
      uint32_t second = 0;
      for (uint32_t i = lane; i < tiles; i += 32) {
        const TilePart part = parts[i];
        if (part.argmax == first) {
          weight += part.weight;
          weighted_exponent += part.exponent;
          second = max(second, ordered_bits(part.second));
        } else if (part.argmax != kNone) {  // its maximum is an ordinary term of the row
          const double x = exponent(part.max), factor = exp(x), terms = 1.0 + part.weight;
          weight += factor * terms;
          weighted_exponent += factor * (part.exponent + x * terms);
          second = max(second, ordered_bits(part.max));
        }
      }
      weight = sum_over_warp(weight);
      weighted_exponent = sum_over_warp(weighted_exponent);
      second = __reduce_max_sync(kAllLanes, second);

      argmax = first;
      const bool sampled = plan.samples && chunk != kNone;
      token = sampled ? race_tokens<T>(job, n, plan, chunk) : first;
      const int64_t given = p.given ? p.given[n] : -1;
      const bool asked = given >= 0 && given < p.V;
      float of_token = max_logit, of_given = -INFINITY;
      if (sampled || asked) {  // one logit a lane
        const LogitsRow<T> row(p, n, plan.source);
        const float z = row.at(uint32_t(asked && lane == 1 ? given : token));
        of_token = __shfl_sync(kAllLanes, z, 0);
        of_given = __shfl_sync(kAllLanes, z, 1);
        if (plan.filters && plan.about_kept && !(of_given >= job.floor(n))) of_given = -INFINITY;
      }
      const double total = 1.0 + weight, log_total = log1p(weight);
      confidence = (sampled ? exp(exponent(of_token)) : 1.0) / total;
      margin = -expm1(exponent(ordered_value(second))) / total;
      entropy = log_total - weighted_exponent / total;
      logsumexp = max_logit * scale + log_total;
      if (asked) p_given = exp(exponent(of_given)) / total;
    }
  }

  if (lane == 0) {
    p.token[n] = token;
    p.argmax[n] = argmax;
    p.flags[n] = int32_t(flags);
    if (p.floor) p.floor[n] = plan.used() && plan.filters ? job.floor(n) : -INFINITY;
    p.confidence[n] = float(confidence);
    p.logsumexp[n] = float(logsumexp);
    p.p_given[n] = float(p_given);
    if (p.margin) p.margin[n] = float(margin);
    if (p.entropy) p.entropy[n] = float(entropy);
  }
}

template <class T>
__global__ void __launch_bounds__(kFinishRows * 32)
    finish_rows_kernel(const __grid_constant__ ConfidenceLaunch job) {
  const uint32_t n = blockIdx.x * kFinishRows + warp_index();
  if (n < job.p.N) finish_row<T>(job, n);
}

inline bool is_adjusted(const TokenConfidenceParams& p) { return p.uncond_logits || p.bias; }
inline bool may_filter(const TokenConfidenceParams& p) {
  return (p.top_k || p.top_p) && (p.temperature || p.distribution == Distribution::kFiltered);
}
inline int64_t tiles_of(const TokenConfidenceParams& p) {
  const int64_t tile =
      is_adjusted(p) || p.dtype == DType::kFloat32 ? kTile<float, true> : kTile<BFloat16, false>;
  return (p.V + tile - 1) / tile;
}
inline int64_t workspace_of(const TokenConfidenceParams& p) {
  const int64_t searches = may_filter(p) ? int64_t(sizeof(FloorSearch)) : 0;
  return p.N * (tiles_of(p) * int64_t(sizeof(TilePart)) + searches);
}
inline const char* why_not_token_confidence(const TokenConfidenceParams& p) {
  // Ids and blocks are counted in 32 bits, and a tile may reach beyond the last id.
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  if (p.N * tiles_of(p) > 0x7fffffff) return "logits must have fewer rows";
  return nullptr;
}

template <class T, bool adjusted>
cudaError_t start_scan(const ConfidenceLaunch& job, cudaStream_t stream) {
  return launch(scan_tiles_kernel<T, adjusted>, dim3(uint32_t(job.p.N) * job.tiles),
                dim3(kScanThreads), TileScan<T, adjusted>::smem().bytes, stream, job);
}

template <class T>
cudaError_t start_rows(ConfidenceLaunch job, cudaStream_t stream) {
  const auto scan = [&] {
    return is_adjusted(job.p) ? start_scan<T, true>(job, stream)
                              : start_scan<T, false>(job, stream);
  };
  cudaError_t error = scan();
  if (may_filter(job.p)) {
    if (error == cudaSuccess) error = start_floor_searches<T>(job, stream);
    job.refining = true;
    if (error == cudaSuccess) error = scan();
  }
  if (error != cudaSuccess) return error;
  const uint32_t blocks = uint32_t((job.p.N + kFinishRows - 1) / kFinishRows);
  return launch(finish_rows_kernel<T>, dim3(blocks), dim3(kFinishRows * 32), 0, stream, job);
}

#ifndef DLM_SIMT
// In files of their own, for the sake of parallel builds.
extern template cudaError_t start_rows<float>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<BFloat16>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<Float16>(ConfidenceLaunch, cudaStream_t);
#endif

// `workspace` has workspace_of(p) bytes.
inline cudaError_t start_token_confidence(const TokenConfidenceParams& p, void* workspace,
                                          cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  const int64_t tiles = tiles_of(p);
  TilePart* parts = static_cast<TilePart*>(workspace);
  FloorSearch* searches =
      may_filter(p) ? reinterpret_cast<FloorSearch*>(parts + p.N * tiles) : nullptr;
  const ConfidenceLaunch job{p, parts, searches, uint32_t(tiles), false, Filter::kCount, 0};
  if (p.dtype == DType::kFloat32) return start_rows<float>(job, stream);
  if (p.dtype == DType::kFloat16) return start_rows<Float16>(job, stream);
  return start_rows<BFloat16>(job, stream);
}

}  // namespace dlm::cuda
