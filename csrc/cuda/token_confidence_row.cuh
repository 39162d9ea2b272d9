// SPDX-License-Identifier: Apache-2.0
// A row of logits as the kernels of token_confidence see it: 16-byte chunks from any address, with
// guidance and bias applied to each logit in the CPU's arithmetic, bit for bit (common/exact.h).
#pragma once
#include <cmath>

#include "common/exact.h"
#include "common/race.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"

namespace dlm::cuda {

constexpr float kLargestFloat = 3.402823466e+38f;

// 32-bit words of one or two elements.
template <class T>
struct Word;
template <>
struct Word<float> {
  static constexpr uint32_t kElements = 1, kMinusInfinity = 0xff800000u;
  static DLM_DEVICE float value(uint32_t word, uint32_t) { return bits_to_float(word); }
  static DLM_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return float_to_bits(ptx::max_nan(bits_to_float(a), bits_to_float(b)));
  }
  static DLM_DEVICE float largest(uint32_t word) { return bits_to_float(word); }
  static DLM_DEVICE uint32_t bits(float x) { return float_to_bits(x); }
};
template <>
struct Word<BFloat16> {
  static constexpr uint32_t kElements = 2, kMinusInfinity = 0xff80ff80u;
  static DLM_DEVICE float value(uint32_t word, uint32_t half) {
    return half ? ptx::unpack_bf16(word).y : ptx::unpack_bf16(word).x;
  }
  static DLM_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return ptx::max_nan_bf16(a, b); }
  static DLM_DEVICE float largest(uint32_t word) {
    return ptx::max_nan(value(word, 0), value(word, 1));
  }
  static DLM_DEVICE uint32_t bits(BFloat16 x) { return x.bits; }
};
template <>
struct Word<Float16> {
  static constexpr uint32_t kElements = 2, kMinusInfinity = 0xfc00fc00u;
  static DLM_DEVICE float value(uint32_t word, uint32_t half) {
    return half ? ptx::unpack_f16(word).y : ptx::unpack_f16(word).x;
  }
  static DLM_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return ptx::max_nan_f16(a, b); }
  static DLM_DEVICE float largest(uint32_t word) {
    return ptx::max_nan(value(word, 0), value(word, 1));
  }
  static DLM_DEVICE uint32_t bits(Float16 x) { return x.bits; }
};

template <class T>
constexpr uint32_t kPerChunk = 16 / sizeof(T);

// Elements first, first + 1, ... of a row of V, read one by one; `absent` where there are none.
template <class T>
DLM_DEVICE uint4 edge_chunk(const T* row, int64_t first, uint32_t V,
                            uint32_t absent = Word<T>::kMinusInfinity) {
  uint32_t words[4];
#pragma unroll
  for (uint32_t w = 0; w < 4; ++w) {
    words[w] = absent;
#pragma unroll
    for (uint32_t j = 0; j < Word<T>::kElements; ++j) {
      const int64_t at = first + w * Word<T>::kElements + j;
      if (at < 0 || at >= V) continue;
      const uint32_t bits = Word<T>::bits(row[at]);
      if (Word<T>::kElements == 1) {
        words[w] = bits;
      } else {
        words[w] = j ? (words[w] & 0xffffu) | bits << 16 : (words[w] & 0xffff0000u) | bits;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The 16 bytes that start `shift` bytes, an even number, into two adjacent chunks.
DLM_DEVICE uint4 across(uint4 a, uint4 b, uint32_t shift) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = shift & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Sixteen bytes per lane: elements first + kPerChunk<T> * lane ... of a row of [begin, V). Vector
// loads stay within the row. If the row is not aligned for vector loads, lanes take the remaining
// bytes from their neighbors.
template <class T>
DLM_DEVICE uint4 load_run(const T* row, uint32_t first, uint32_t V, uint32_t begin = 0) {
  constexpr uint32_t n = kPerChunk<T>;
  const uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(row) % 16), lane = lane_index();
  if (shift != 0 && first > begin && first + 33 * n <= V) {
    const char* at = reinterpret_cast<const char*>(row + first) - shift + lane * 16;
    const uint4 own = ptx::ld_global_stream_16(at);
    uint4 next =
        make_uint4(__shfl_down_sync(kAllLanes, own.x, 1), __shfl_down_sync(kAllLanes, own.y, 1),
                   __shfl_down_sync(kAllLanes, own.z, 1), __shfl_down_sync(kAllLanes, own.w, 1));
    if (lane == 31) next = ptx::ld_global_stream_16(at + 16);
    return across(own, next, shift);
  }
  const uint32_t own = first + lane * n;
  if (shift == 0 && own + n <= V) return ptx::ld_global_stream_16(row + own);
  return edge_chunk(row, own, V);
}

// The chunk of elements first, first + 1, ...; first is a multiple of kPerChunk<T>. Vector loads
// stay within the row, [begin, V).
template <class T>
DLM_DEVICE uint4 load_chunk(const T* row, uint32_t first, uint32_t V, uint32_t begin = 0) {
  const T* at = row + first;
  const uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(at) % 16);
  if (shift == 0 && first + kPerChunk<T> <= V) return ptx::ld_global_stream_16(at);
  if (shift != 0 && first > begin && first + 2 * kPerChunk<T> <= V) {
    const char* chunk = reinterpret_cast<const char*>(at) - shift;
    return across(ptx::ld_global_stream_16(chunk), ptx::ld_global_stream_16(chunk + 16), shift);
  }
  return edge_chunk(row, first, V);
}

// How a row is sampled, filtered and described.
struct RowPlan {
  int64_t source;  // row of logits; -1: unused
  float temperature, inverse;
  bool samples, filters, about_kept;
  int32_t k;
  float top_p;

  DLM_DEVICE RowPlan(const TokenConfidenceParams& p, uint32_t n)
      : source(p.row_map ? p.row_map[n] : int64_t(n)),
        k(row_value(p.top_k, n, 0)),
        top_p(row_value(p.top_p, n, 1.0f)) {
    if (source >= p.R) source = -1;
    const float asked = row_value(p.temperature, n, 0.0f);
    samples = asked > 0.0f;
    temperature = samples ? asked : 1.0f;
    inverse = div_rn(1.0f, temperature);
    about_kept = p.distribution == Distribution::kFiltered;
    filters = (k > 0 || top_p < 1.0f) && (samples || about_kept);
  }
  DLM_DEVICE bool used() const { return source >= 0; }
};

template <class T>
class LogitsRow {
 public:
  DLM_DEVICE LogitsRow(const TokenConfidenceParams& p, uint32_t n, int64_t source)
      : V(uint32_t(p.V)),
        begin_(uint32_t(p.first)),
        logits(static_cast<const T*>(p.logits) + source * p.logits_stride),
        uncond_(p.uncond_logits ? static_cast<const T*>(p.uncond_logits) + source * p.uncond_stride
                                : nullptr),
        guidance_(add_rn(row_value(p.cfg_scale, n, 0.0f), 1.0f)),
        bias_(shared_row(p.bias, n, p.bias_rows_per_value, p.columns())),
        banned_(shared_row(p.banned, n, p.banned_rows_per_value, p.banned_count)),
        banned_count_(uint32_t(p.banned_count)),
        bitmask_(shared_row(p.bitmask, n, p.bitmask_rows_per_value, p.bitmask_words)) {}

  // kPerChunk<T> logits starting at `first`, with guidance and bias, without NaN and +inf; -inf
  // beyond the row's end.
  DLM_DEVICE void values(uint32_t first, float* z, uint32_t& flags) const {
    spread<T>(load_chunk(logits, first, V, begin_), z);
    if (uncond_) guide(z, load_chunk(uncond_, first, V, begin_));
    adjust(first, z, flags);
  }

  // Processes a run of given raw logits: adds the bias, replaces NaN and +inf, and sets -inf beyond
  // the row's end.
  DLM_DEVICE void adjust(uint32_t first, float* z, uint32_t& flags) const {
    constexpr uint32_t n = kPerChunk<T>;
    if (bias_) {
#pragma unroll
      for (uint32_t c = 0; c < n; c += 4) {
        const uint4 bias = load_chunk(bias_, first + c, V, begin_);
        z[c] = add_rn(z[c], bits_to_float(bias.x));
        z[c + 1] = add_rn(z[c + 1], bits_to_float(bias.y));
        z[c + 2] = add_rn(z[c + 2], bits_to_float(bias.z));
        z[c + 3] = add_rn(z[c + 3], bits_to_float(bias.w));
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < n; ++j) {
      z[j] = first + j < V ? sanitised(z[j], flags) : -INFINITY;
    }
  }

  // A warp's lane has eight logits of a chunk of kRaceChunk: the eight starting at 8 lane or, for
  // 32-bit elements, four starting at 4 lane and the four 128 after them.
  static constexpr bool kTwoRuns = kPerChunk<T> == 4;
  static constexpr uint32_t kRuns = 8 / kPerChunk<T>;
  static DLM_DEVICE uint32_t id_of(uint32_t chunk, uint32_t j) {
    constexpr uint32_t n = kPerChunk<T>;
    return chunk * kRaceChunk + j / n * 128 + lane_index() * n + j % n;
  }
  // Whether the logits of `count` chunks can be used as they are in memory, read by aligned vector
  // loads: inside the row, without guidance, bias, bans or a bitmask.
  DLM_DEVICE bool is_simple(uint32_t chunk, uint32_t count) const {
    const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
    if (!aligned || uncond_ || bias_ || bitmask_ || (chunk + count) * kRaceChunk > V) return false;
    bool any = false;
    each_banned(chunk * kRaceChunk, count * kRaceChunk, [&](uint32_t) { any = true; });
    return !any;
  }
  DLM_DEVICE void load_simple(uint32_t chunk, uint4 (&raw)[kRuns]) const {
#pragma unroll
    for (uint32_t r = 0; r < kRuns; ++r)
      raw[r] = ptx::ld_global_stream_16(logits + id_of(chunk, r * kPerChunk<T>));
  }
  static DLM_DEVICE void unpack(const uint4 (&raw)[kRuns], float (&z)[8]) {
#pragma unroll
    for (uint32_t r = 0; r < kRuns; ++r) spread<T>(raw[r], z + r * kPerChunk<T>);
  }
  // Returns NaN if there is any.
  static DLM_DEVICE float largest_of(const uint4 (&raw)[kRuns]) {
    uint32_t most = Word<T>::kMinusInfinity;
#pragma unroll
    for (const uint4& v : raw) {
      most = Word<T>::larger(most,
                             Word<T>::larger(Word<T>::larger(v.x, v.y), Word<T>::larger(v.z, v.w)));
    }
    return Word<T>::largest(most);
  }

  // Any chunk's logits: with guidance and bias, without NaN and +inf, -inf where they are banned,
  // not allowed or beyond the row's end.
  DLM_DEVICE void effective(uint32_t chunk, float (&z)[8], uint32_t& flags) const {
    constexpr uint32_t n = kPerChunk<T>;
#pragma unroll
    for (uint32_t r = 0; r < kRuns; ++r) {
      float* run = z + r * n;
      const uint32_t first = id_of(chunk, r * n);
      if (uncond_ || bias_) {
        values(first, run, flags);
      } else {
        spread<T>(load_run(logits, chunk * kRaceChunk + r * 128, V, begin_), run);
#pragma unroll
        for (uint32_t j = 0; j < n; ++j) run[j] = sanitised(run[j], flags);
      }
    }
    leave_out(chunk, z);
  }

  // The same for logits that are given instead of read from memory: a lane's eight and, with
  // guidance, those of the unconditional row (`to_guide`).
  DLM_DEVICE void effective_of(uint32_t chunk, const uint4 (&own)[kRuns], bool to_guide,
                               const uint4 (&uncond)[kRuns], float (&z)[8], uint32_t& flags) const {
    constexpr uint32_t n = kPerChunk<T>;
#pragma unroll
    for (uint32_t r = 0; r < kRuns; ++r) {
      spread<T>(own[r], z + r * n);
      if (to_guide) guide(z + r * n, uncond[r]);
      adjust(id_of(chunk, r * n), z + r * n, flags);
    }
    leave_out(chunk, z);
  }

  // Sets -inf where a chunk's ids are banned or not allowed.
  DLM_DEVICE void leave_out(uint32_t chunk, float (&z)[8]) const {
    constexpr uint32_t n = kPerChunk<T>;
#pragma unroll
    for (uint32_t r = 0; r < kRuns; ++r) {
      const uint32_t bits = allowed(id_of(chunk, r * n));
#pragma unroll
      for (uint32_t j = 0; j < n; ++j) z[r * n + j] = bits >> j & 1 ? z[r * n + j] : -INFINITY;
    }
    each_banned(chunk * kRaceChunk, kRaceChunk, [&](uint32_t offset) {
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) z[j] = id_of(0, j) == offset ? -INFINITY : z[j];
    });
  }

  // Bit j: whether the bitmask allows id first + j. first is a multiple of 4, and the requested
  // bits lie in one word.
  DLM_DEVICE uint32_t allowed(uint32_t first) const {
    return bitmask_ && first < V ? uint32_t(bitmask_[first / 32]) >> first % 32 : 0xffffffffu;
  }

  // Calls ban(offset) for each banned id in [begin, begin + count).
  template <class Ban>
  DLM_DEVICE void each_banned(uint32_t begin, uint32_t count, Ban ban) const {
    for (uint32_t i = 0; i < banned_count_; ++i) {
      const uint64_t offset = uint64_t(banned_[i]) - begin;
      if (offset < count) ban(uint32_t(offset));
    }
  }

  // A single logit, -inf where it is banned or not allowed.
  DLM_DEVICE float at(uint32_t v) const {
    float z = to_float(logits[v]);
    if (uncond_) z = guided(z, to_float(uncond_[v]));
    if (bias_) z = add_rn(z, bias_[v]);
    uint32_t flags = 0;
    z = sanitised(z, flags);
    if (bitmask_ && !(uint32_t(bitmask_[v / 32]) >> v % 32 & 1)) z = -INFINITY;
    each_banned(v, 1, [&](uint32_t) { z = -INFINITY; });
    return z;
  }

  const uint32_t V;       // ids are those of the whole vocabulary,
  const uint32_t begin_;  // of which this is the first one present
  const T* const logits;

 private:
  template <class U>
  static DLM_DEVICE const U* shared_row(const U* rows, uint32_t n, int64_t rows_per_value,
                                        int64_t columns) {
    return rows ? rows + int64_t(n / uint32_t(rows_per_value)) * columns : nullptr;
  }
  DLM_DEVICE void guide(float* z, uint4 uncond) const {
    float u[kPerChunk<T>];
    spread<T>(uncond, u);
#pragma unroll
    for (uint32_t j = 0; j < kPerChunk<T>; ++j) z[j] = guided(z[j], u[j]);
  }
  DLM_DEVICE float guided(float z, float u) const {
    return add_rn(u, mul_rn(guidance_, add_rn(z, -u)));
  }
  static DLM_DEVICE float sanitised(float z, uint32_t& flags) {
    if (z <= kLargestFloat) return z;
    flags |= z != z ? kFlagNaN : kFlagPosInf;
    return z != z ? -INFINITY : kLargestFloat;
  }
  template <class U>
  static DLM_DEVICE void spread(uint4 chunk, float* z) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (uint32_t j = 0; j < kPerChunk<U>; ++j)
      z[j] = Word<U>::value(words[j / Word<U>::kElements], j % Word<U>::kElements);
  }

  const T* const uncond_;
  const float guidance_;
  const float* const bias_;
  const int64_t* const banned_;
  const uint32_t banned_count_;
  const int32_t* const bitmask_;
};

}  // namespace dlm::cuda
