// SPDX-License-Identifier: Apache-2.0
// Token, probability and statistics of each row of logits. For all v but the argmax,
//   x_v = (z_v - max) / T,   S = sum of e^x_v,   X = sum of x_v e^x_v
// scan: a block takes a tile of a row (32 KiB, 8 chunks of 16 bytes a thread), copies it to shared
// memory, finds the maximum, leaves the argmax out, adds up S and X, keeps the best perturbed
// logit. finish: a warp takes a row and joins its tiles, in double, in a fixed order. Tiles depend
// on V and the element type alone, so a row's bits do not depend on the batch. A second kernel, not
// the last block to arrive, needs no counter that somebody must have cleared. Filtered rows:
// token_confidence_filter.cuh finds their floors in between, and they are scanned again, from L2.
// Other rows are read once: V elements; 9 PTX instructions a logit in the two loops over a tile are
// meant to take less time than the loads, but for rows that draw. Needs sm_80.
#pragma once
#include <type_traits>

#include "common/order.h"
#include "common/philox.h"
#include "cuda/token_confidence.h"
#include "cuda/token_confidence_filter.cuh"

namespace dlm::cuda {

// A block works for about as long as its loads take; six of them fit an SM of 228 KiB, so that most
// have loads under way while others compute.
constexpr uint32_t kScanThreads = 256, kScanChunks = 8, kScanWarps = kScanThreads / 32;
constexpr uint32_t kFinishRows = 4;  // warps of a block of the second kernel

// Guided or biased logits are kept as floats.
template <class T, bool adjusted>
using Stored = std::conditional_t<adjusted, float, T>;
template <class T, bool adjusted>
constexpr uint32_t kTile = kScanThreads * kScanChunks * kPerChunk<Stored<T, adjusted>>;

// gumbel(r) is at least this for every r, and at most that.
constexpr float kLeastGumbel = -2.83f, kGreatestGumbel = 22.9f;

template <class T, bool adjusted, ConfidenceFault fault>
class TileScan {
  using S = Stored<T, adjusted>;
  static constexpr uint32_t kChunk = kPerChunk<S>, kLoad = kPerChunk<T>, kSpread = kLoad / kChunk;
  static constexpr uint32_t kLogits = kTile<T, adjusted>;

  // Of a thread, then of a warp, then of the tile. Ordered bits (common/order.h) for floats.
  struct Found {
    float weight, exponent;        // S and X / ln 2
    uint32_t rest, count, argmax;  // largest but for the maximum; how many are it; the first one
    uint32_t drawn, drawn_id, flags;
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
    if (fault != ConfidenceFault::kMaximumReadTooEarly) __syncthreads();
    const float tile_max = ordered_value(gather_partials<Greatest>(partial_));

    Found found{0.0f, 0.0f, 0, 0, kNone, 0, kNone, flags_};
    const bool after_filter = job_.refining || !plan_.filters;
    if (tile_max > -INFINITY) {
      if (plan_.samples && after_filter) draw(tile_max, found);
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

  // Thread-private: slot i * kScanThreads + threadIdx.x. A chunk of T fills kSpread slots in turn.
  DLM_DEVICE uint32_t first_id(uint32_t i) const {
    return begin_ + (i / kSpread * kScanThreads + threadIdx.x) * kLoad + i % kSpread * kChunk;
  }
  DLM_DEVICE uint32_t slot(uint32_t i) const { return i * kScanThreads + threadIdx.x; }
  DLM_DEVICE uint32_t address(uint32_t i) const { return ptx::smem_address(tile_ + slot(i)); }
  DLM_DEVICE uint4 chunk(uint32_t i) const { return ptx::ld_shared_16(address(i)); }
  DLM_DEVICE S* elements(uint32_t i) const { return reinterpret_cast<S*>(tile_ + slot(i)); }

  // Copies whole chunks of memory, from the one that holds the tile's first byte; a tile that
  // starts within a chunk is then moved into place.
  DLM_DEVICE void copy(const LogitsRow<T>& row) {
    const uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(row.logits) % 16);
    const int64_t lead = shift / sizeof(T) + (fault == ConfidenceFault::kLoadsOneOff ? 1 : 0);
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) copy_chunk(row, first_id(i) - lead, address(i));
    if (shift != 0 && threadIdx.x == 0)
      copy_chunk(row, int64_t(begin_) + kLogits - lead, address(kScanChunks));
    ptx::cp_async_commit();
    ptx::cp_async_wait<fault == ConfidenceFault::kLaxWait ? 1 : 0>();
    if (shift == 0) return;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) {
      const uint4 moved = across(chunk(i), ptx::ld_shared_16(address(i) + 16), shift);
      if (fault != ConfidenceFault::kMovesTooEarly) __syncthreads();
      ptx::st_shared_16(address(i), moved);
    }
  }
  DLM_DEVICE void copy_chunk(const LogitsRow<T>& row, int64_t first, uint32_t to) {
    const uint32_t end = fault == ConfidenceFault::kOverread       ? row.V + kLoad - 1
                         : fault == ConfidenceFault::kUnmaskedTail ? (row.V + 7) / 8 * 8
                                                                   : row.V;
    if (first >= 0 && first + kLoad <= end) {
      ptx::cp_async_16(to, row.logits + first);
    } else {
      ptx::st_shared_16(to, edge_chunk(row.logits, first, end));
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
      if (load % kScanThreads != threadIdx.x) return;
      const uint32_t i = load / kScanThreads * kSpread + within / kChunk;
      elements(i)[within % kChunk] = from_float<S>(-INFINITY);
      any = true;
    });
    if (row.has_bitmask()) {
      edit([&](float, uint32_t id) { return row.allowed(id / 4 * 4) >> id % 4 & 1; });
      any = true;
    }
    if (job_.refining) {
      const float floor = job_.floor[n_];
      edit([&](float z, uint32_t) { return fminf(z, kLargestFloat) >= floor; });
      any = true;
    }
    return any;
  }

  // The best of z * (1/T) + noise. A warp knows of a value that it has, or that the tile's maximum
  // must reach; noise of a random word r is at most -log(r / 2^32), so of a chunk whose largest
  // logit is `need` short of that value only words up to 2^32 e^-need can matter. Their bits then
  // decide, the CPU's arithmetic being used.
  DLM_DEVICE void draw(float tile_max, Found& found) const {
    const uint64_t seed = uint64_t(row_value(job_.p.random.seed, n_, int64_t(0)));
    const uint32_t step = uint32_t(row_value(job_.p.random.step, n_, 0));
    const uint32_t position = uint32_t(job_.p.random.position[n_]);
    const float inverse = plan_.inverse;
    float reached = mul_add_rn(fminf(tile_max, kLargestFloat), inverse, kLeastGumbel);
    if (fault == ConfidenceFault::kBoundTooHigh) reached = add_rn(reached, 9.0f);
    float best = -INFINITY;
#pragma unroll 1
    for (uint32_t i = 0; i < kScanChunks; ++i) {
      const uint4 v = chunk(i);
      const uint32_t top = Word<S>::larger(Word<S>::larger(v.x, v.y), Word<S>::larger(v.z, v.w));
      const float largest = mul_rn(fminf(Word<S>::largest(top), kLargestFloat), inverse);
      // The slack covers the rounding of both sides many times over. NaN of infinities: no bound.
      const float need = reached - largest - (1e-3f + 1e-6f * fabsf(reached));
      if (!(need > kGreatestGumbel)) {
        const float share = ptx::exp2_approx(32.0f - need * 1.44269504f);
        const uint32_t limit = share < 4294967040.0f ? uint32_t(share) : 0xffffffffu;
        const uint32_t id = first_id(i);
#pragma unroll 1
        for (uint32_t j = 0; j < kChunk; j += 4) {
          const Philox4 r = philox(seed, position, step, Stream::kToken, (id + j) / 4);
          uint32_t candidates = uint32_t(r.word[0] <= limit) | uint32_t(r.word[1] <= limit) << 1 |
                                uint32_t(r.word[2] <= limit) << 2 |
                                uint32_t(r.word[3] <= limit) << 3;
#pragma unroll 1
          for (; candidates; candidates &= candidates - 1) {
            const uint32_t k = uint32_t(__ffs(int(candidates)) - 1);
            const uint32_t low = k & 1 ? r.word[1] : r.word[0],
                           high = k & 1 ? r.word[3] : r.word[2];
            const float z = fminf(to_float(elements(i)[j + k]), kLargestFloat);
            const float value = mul_add_rn(z, inverse, gumbel(k & 2 ? high : low));
            if (value > best) {  // ids ascend within a thread
              best = value;
              found.drawn_id = id + j + k;
            }
          }
        }
      }
      found.drawn = __reduce_max_sync(kAllLanes, ordered_bits(best));
      reached = fmaxf(reached, ordered_value(found.drawn));
    }
    found.drawn = ordered_bits(best);
  }

  // Leaves the maximum out, wherever this thread has it; returns the largest of the others.
  DLM_DEVICE float take_maximum(float tile_max, Found& found) {
    if (fault == ConfidenceFault::kMaximumStays) return tile_max;
    edit([&](float z, uint32_t id) {
      if (z < tile_max) return true;
      found.count += 1;
      if (fault == ConfidenceFault::kHighIdWinsTies || found.argmax == kNone) found.argmax = id;
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
    const uint32_t drawn = __reduce_max_sync(kAllLanes, f.drawn);
    f.drawn_id = __reduce_min_sync(kAllLanes, f.drawn == drawn ? f.drawn_id : kNone);
    f.drawn = drawn;
    return f;
  }
  DLM_DEVICE Found over_block(Found f) const {
    if (fault == ConfidenceFault::kDivergentShuffle) {
      if (f.count == 0) f = over_warp(f);
    } else {
      f = over_warp(f);
    }
    if (lane_index() == 0) of_warp_[warp_index()] = f;
    if (fault != ConfidenceFault::kPartsReadTooEarly) __syncthreads();
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
      part.drawn = found.drawn;
      part.drawn_id = found.drawn_id;
      *out = part;
    } else if (job_.refining) {  // only the sample is about the kept logits
      out->drawn = found.drawn;
      out->drawn_id = found.drawn_id;
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

template <class T, bool adjusted, ConfidenceFault fault>
__global__ void __launch_bounds__(kScanThreads, 6)
    scan_tiles_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  TileScan<T, adjusted, fault>(job, smem).run();
}

DLM_DEVICE double sum_over_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// By one warp.
template <class T, ConfidenceFault fault>
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
    const uint32_t tiles = job.tiles - (fault == ConfidenceFault::kWrongTiles ? 1 : 0);
    uint32_t top = 0, drawn = 0;
    for (uint32_t i = lane; i < tiles; i += 32) {
      top = max(top, ordered_bits(parts[i].max));
      drawn = max(drawn, parts[i].drawn);
      flags |= parts[i].flags;
    }
    top = __reduce_max_sync(kAllLanes, top);
    drawn = __reduce_max_sync(kAllLanes, drawn);
    flags = __reduce_or_sync(kAllLanes, flags);
    const float max_logit = ordered_value(top);

    uint32_t first = kNone, drawn_id = kNone;
    for (uint32_t i = lane; i < tiles; i += 32) {
      if (parts[i].max == max_logit) first = min(first, parts[i].argmax);
      if (parts[i].drawn == drawn) drawn_id = min(drawn_id, parts[i].drawn_id);
    }
    first = __reduce_min_sync(kAllLanes, first);
    drawn_id = __reduce_min_sync(kAllLanes, drawn_id);

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
      const bool sampled = plan.samples && drawn_id != kNone;
      token = sampled ? drawn_id : first;
      const int64_t given = p.given ? p.given[n] : -1;
      const bool asked = given >= 0 && given < p.V;
      float of_token = max_logit, of_given = -INFINITY;
      if (sampled || asked) {  // one logit a lane
        const LogitsRow<T> row(p, n, plan.source);
        const float z = row.at(uint32_t(asked && lane == 1 ? given : token));
        of_token = __shfl_sync(kAllLanes, z, 0);
        of_given = __shfl_sync(kAllLanes, z, 1);
        if (plan.filters && plan.about_kept && !(of_given >= job.floor[n])) of_given = -INFINITY;
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
    if (p.floor) p.floor[n] = plan.used() && plan.filters ? job.floor[n] : -INFINITY;
    p.confidence[n] = float(confidence);
    p.logsumexp[n] = float(logsumexp);
    p.p_given[n] = float(p_given);
    if (p.margin) p.margin[n] = float(margin);
    if (p.entropy) p.entropy[n] = float(entropy);
  }
}

template <class T, ConfidenceFault fault>
__global__ void __launch_bounds__(kFinishRows * 32)
    finish_rows_kernel(const __grid_constant__ ConfidenceLaunch job) {
  const uint32_t n = blockIdx.x * kFinishRows + warp_index();
  if (n < job.p.N) finish_row<T, fault>(job, n);
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
  const int64_t floors = may_filter(p) ? (p.N + 3) / 4 * 16 : 0;
  return p.N * tiles_of(p) * int64_t(sizeof(TilePart)) + floors;
}
inline const char* why_not_token_confidence(const TokenConfidenceParams& p) {
  // Ids and blocks are counted in 32 bits, and a tile may reach beyond the last id.
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  if (p.N * tiles_of(p) > 0x7fffffff) return "logits must have fewer rows";
  return nullptr;
}

template <class T, bool adjusted, ConfidenceFault fault>
cudaError_t start_scan(const ConfidenceLaunch& job, cudaStream_t stream) {
  return launch(scan_tiles_kernel<T, adjusted, fault>, dim3(uint32_t(job.p.N) * job.tiles),
                dim3(kScanThreads), TileScan<T, adjusted, fault>::smem().bytes, stream, job);
}

template <class T, ConfidenceFault fault>
cudaError_t start_rows(ConfidenceLaunch job, cudaStream_t stream) {
  const auto scan = [&] {
    if constexpr (fault == ConfidenceFault::kNone) {
      if (is_adjusted(job.p)) return start_scan<T, true, fault>(job, stream);
    }
    return start_scan<T, false, fault>(job, stream);
  };
  cudaError_t error = scan();
  if (may_filter(job.p)) {
    if (error == cudaSuccess) {
      error = launch(find_floors_kernel<T, fault>, dim3(uint32_t(job.p.N)), dim3(kFilterThreads),
                     RowFilter<T, fault>::smem().bytes, stream, job);
    }
    job.refining = true;
    if (error == cudaSuccess) error = scan();
  }
  if (error != cudaSuccess) return error;
  const uint32_t blocks = uint32_t((job.p.N + kFinishRows - 1) / kFinishRows);
  return launch(finish_rows_kernel<T, fault>, dim3(blocks), dim3(kFinishRows * 32), 0, stream, job);
}

// `workspace` has workspace_of(p) bytes.
template <ConfidenceFault fault = ConfidenceFault::kNone>
cudaError_t start_token_confidence(const TokenConfidenceParams& p, void* workspace,
                                   cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  const int64_t tiles = tiles_of(p);
  TilePart* parts = static_cast<TilePart*>(workspace);
  float* floor = reinterpret_cast<float*>(parts + p.N * tiles);
  const ConfidenceLaunch job{p, parts, floor, uint32_t(tiles), false};
  if constexpr (fault == ConfidenceFault::kNone) {
    if (p.dtype == DType::kFloat32) return start_rows<float, fault>(job, stream);
    if (p.dtype == DType::kFloat16) return start_rows<Float16, fault>(job, stream);
  }
  return start_rows<BFloat16, fault>(job, stream);
}

}  // namespace dlm::cuda
