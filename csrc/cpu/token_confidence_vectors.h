// SPDX-License-Identifier: Apache-2.0
// Kernels of token_confidence (see token_confidence.cpp) in vectors: each file for one instruction
// set includes this after its simd_*.h. A chunk is converted to float on the stack (1 KiB), finding
// its largest logit on the way; then one loop adds e^(z - largest). Operations for 16 logits: 2 to
// convert, 2 for the maximum and the non-finite values, 15 for the exponential and its sum (17 with
// temperature and entropy). These are the limit, not the bytes of the logits, as long as those come
// from a cache.
#pragma once
#include <algorithm>
#include <limits>

#include "common/math.h"
#include "cpu/token_confidence.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

constexpr int kVectors = kRaceChunk / kWidth;  // per chunk
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMost = std::numeric_limits<float>::max();

// --- logits ------------------------------------------------------------------------------------

// Bits [at, at + n) of a row's bitmask, n at most 16.
DLM_SIMD uint32_t allowed_bits(const int32_t* bitmask, int64_t at, int n) {
  const uint64_t low = uint32_t(bitmask[at / 32]), high = uint32_t(bitmask[(at + n - 1) / 32]);
  return uint32_t((low | high << 32) >> at % 32);
}

// Logits [at, at + n) of a row, n at most 16: with guidance and bias, without NaN and +inf, and
// -inf where they are not allowed or below the floor. Banned ids may be among them; elements beyond
// n are undefined.
template <class T>
DLM_SIMD Floats effective(const LogitsRow& row, int64_t at, int n, int32_t& flags) {
  Floats x = load_first(n, static_cast<const T*>(row.logits) + at);
  if (row.uncond) {
    const Floats u = load_first(n, static_cast<const T*>(row.uncond) + at);
    x = u + splat(row.guidance) * (x - u);
  }
  if (row.bias) x = x + load_first(n, row.bias + at);
  const Mask there = first(n), ordinary = at_least(splat(kMost), x);
  if (to_bits(ordinary) != 0xffffu) {
    const Mask nan = is_nan(x);
    flags |= to_bits(nan) & to_bits(there) ? kFlagNaN : 0;
    flags |= ~to_bits(nan) & ~to_bits(ordinary) & to_bits(there) ? kFlagPosInf : 0;
    x = select(ordinary, x, select(nan, splat(-kInfinity), splat(kMost)));
  }
  if (row.bitmask) x = select(to_mask(allowed_bits(row.bitmask, at, n)), x, splat(-kInfinity));
  return select(at_least(x, splat(row.floor)), x, splat(-kInfinity));
}

float largest_of_chunk(const float* z) {
  Floats top[4] = {load(z), load(z + kWidth), load(z + 2 * kWidth), load(z + 3 * kWidth)};
  for (int i = 4; i < kVectors; i += 4) {
    for (int j = 0; j < 4; ++j) top[j] = max(top[j], load(z + (i + j) * kWidth));
  }
  return largest(max(max(top[0], top[1]), max(top[2], top[3])));
}

template <class T>
class Row {
 public:
  explicit Row(const LogitsRow& row)
      : row_(row), plain_(!row.uncond && !row.bias && !row.bitmask && !(row.floor > -kInfinity)) {}

  // Writes the logits of a chunk, -inf beyond the row; returns the largest.
  DLM_SIMD float load(int64_t chunk, float* z) {
    const int64_t begin = chunk * kRaceChunk, n = std::min<int64_t>(kRaceChunk, row_.V - begin);
    const bool copied = plain_ && n == kRaceChunk;
    float top = copied ? copy(static_cast<const T*>(row_.logits) + begin, z) : kInfinity;
    if (!(top <= kMost)) top = adjust(begin, n, z);
    if (row_.banned && ban(begin, z)) top = largest_of_chunk(z);
    return top;
  }

  int32_t flags = 0;

 private:
  // Returns the largest logit, or +inf if there is any NaN or +inf.
  DLM_SIMD float copy(const T* logits, float* z) {
    using dlm::cpu::DLM_NAMESPACE::load;
    Floats top[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
    Mask ordinary[4] = {to_mask(0xffff), to_mask(0xffff), to_mask(0xffff), to_mask(0xffff)};
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      const Floats x = load(logits + i * kWidth);
      store(z + i * kWidth, x);
      top[i % 4] = max(x, top[i % 4]);
      ordinary[i % 4] = ordinary[i % 4] & at_least(splat(kMost), x);
    }
    const Mask all = (ordinary[0] & ordinary[1]) & (ordinary[2] & ordinary[3]);
    return to_bits(all) == 0xffffu ? largest(max(max(top[0], top[1]), max(top[2], top[3])))
                                   : kInfinity;
  }

  __attribute__((noinline)) float adjust(int64_t begin, int64_t n, float* z) {
    for (int i = 0; i < kRaceChunk; i += kWidth) {
      const int there = int(std::clamp<int64_t>(n - i, 0, kWidth));
      const Floats x = there ? effective<T>(row_, begin + i, there, flags) : splat(-kInfinity);
      store(z + i, select(first(there), x, splat(-kInfinity)));
    }
    return largest_of_chunk(z);
  }

  // Returns true if any logit of the chunk is banned.
  DLM_SIMD bool ban(int64_t begin, float* z) {
    bool any = false;
    for (int64_t i = 0; i < row_.banned_count; ++i) {
      const uint64_t at = uint64_t(row_.banned[i] - begin);
      if (at >= uint64_t(kRaceChunk)) continue;
      z[at] = -kInfinity;
      any = true;
    }
    return any;
  }

  const LogitsRow& row_;
  const bool plain_;
};

template <class T>
float load_chunk_as(const LogitsRow& row, int64_t chunk, float* z) {
  return Row<T>(row).load(chunk, z);
}

float load_chunk(const LogitsRow& row, int64_t chunk, float* z) {
  switch (row.dtype) {
    case DType::kFloat32:
      return load_chunk_as<float>(row, chunk, z);
    case DType::kBFloat16:
      return load_chunk_as<BFloat16>(row, chunk, z);
    default:
      return load_chunk_as<Float16>(row, chunk, z);
  }
}

int64_t collect(const float* z, float low, float high, float* to, uint64_t* above) {
  int64_t count = 0;
  for (int i = 0; i < kRaceChunk; i += kWidth) {
    const Floats x = load(z + i);
    const Mask inside = at_least(x, splat(low)) & at_least(splat(high), x);
    count += append(to + count, inside, x);
    *above += uint64_t(__builtin_popcount(to_bits(less(splat(high), x))));
  }
  return count;
}

// dlm::chunk_exp on 16 elements, bit for bit. `normal` selects elements with x at least
// kExpUnderflow; the result is 0 elsewhere.
DLM_SIMD Floats chunk_exp(Floats x, Mask normal) {
  const Floats shifted = fma(x, splat(kLog2E), splat(12582912.0f));
  const Floats n = shifted - splat(12582912.0f);
  const Floats f = fma(x, splat(kLog2ERest), fms(x, splat(kLog2E), n));
  Floats p = fma(splat(kExp2C6), f, splat(kExp2C5));
  p = fma(p, f, splat(kExp2C4));
  p = fma(p, f, splat(kExp2C3));
  p = fma(p, f, splat(kExp2C2));
  p = fma(p, f, splat(kExp2C1));
  p = fma(p, f, splat(1.0f));
  return select(normal, from_bits(bits(p) + (bits(shifted) << 23)), splat(0.0f));
}

uint64_t mass_above(const float* z, float max, float scale, float above) {
  Wholes total;
  for (int i = 0; i < kRaceChunk; i += kWidth) {
    const Floats x = load(z + i);
    const Floats exponent = (x - splat(max)) * splat(scale);
    const Mask counts = less(splat(above), x) & at_least(exponent, splat(kExpUnderflow));
    total.add(chunk_exp(exponent, counts) * splat(kMassUnits));
  }
  return total.sum();
}

// --- sums --------------------------------------------------------------------------------------

// Sums over a chunk. Weights are added in the tree order of dlm::chunk_sum, which keeps elements in
// their lanes until one vector is left.
template <bool kScaled, bool kExponent>
class Adder {
 public:
  DLM_SIMD Adder(const float* z, float largest, float scale)
      : z_(z), largest_(splat(largest)), scale_(splat(scale)) {}

  DLM_SIMD Sums run() {
    const Terms all = tree<1, 0>();
    return {sum(all.weight), kExponent ? sum(all.exponent) : 0.0f};
  }

 private:
  struct Terms {
    Floats weight, exponent;
  };

  template <int n, int i>
  DLM_SIMD Terms tree() {
    if constexpr (n == kVectors) {
      return terms(i);
    } else {
      const Terms first = tree<2 * n, i>(), other = tree<2 * n, i + n>();
      return {first.weight + other.weight,
              kExponent ? first.exponent + other.exponent : first.exponent};
    }
  }
  DLM_SIMD Terms terms(int i) {
    Floats x = load(z_ + i * kWidth) - largest_;
    if (kScaled) x = x * scale_;
    const Floats w = chunk_exp(x, at_least(x, splat(kExpUnderflow)));
    return {w, kExponent ? w * max(x, splat(kExpUnderflow)) : w};
  }

  const float* const z_;
  const Floats largest_, scale_;
};

Sums sum_chunk(const float* z, float largest, float scale) {
  return Adder<true, true>(z, largest, scale).run();
}

template <class T, bool kScaled, bool kExponent>
int32_t sum_chunks_as(const LogitsRow& logits, int64_t begin, int64_t end, const Wanted& want,
                      const ChunkSums& sums) {
  Row<T> row(logits);
  // Works one chunk ahead, so that its largest logit is known by the time the sums need it.
  alignas(64) float z[2][kRaceChunk];
  float next = row.load(begin, z[begin % 2]);
  for (int64_t c = begin; c < end; ++c) {
    const float top = next, *own = z[c % 2];
    if (c + 1 < end) next = row.load(c + 1, z[(c + 1) % 2]);
    const bool any = top > -kInfinity;
    sums.largest[c] = top;
    const Sums found =
        any ? Adder<kScaled, kExponent>(own, top, want.scale).run() : Sums{0.0f, 0.0f};
    sums.weight[c] = found.weight;
    if (kExponent) sums.exponent[c] = found.exponent;
    if (want.tempered) {
      sums.tempered[c] =
          any ? Adder<true, false>(own, top, want.inverse_temperature).run().weight : 0.0f;
    }
  }
  return row.flags;
}

template <class T>
int32_t sum_chunks_as(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want,
                      const ChunkSums& sums) {
  if (want.scale == 1.0f) {
    return want.exponent ? sum_chunks_as<T, false, true>(row, begin, end, want, sums)
                         : sum_chunks_as<T, false, false>(row, begin, end, want, sums);
  }
  return want.exponent ? sum_chunks_as<T, true, true>(row, begin, end, want, sums)
                       : sum_chunks_as<T, true, false>(row, begin, end, want, sums);
}

int32_t sum_chunks(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want,
                   const ChunkSums& sums) {
  switch (row.dtype) {
    case DType::kFloat32:
      return sum_chunks_as<float>(row, begin, end, want, sums);
    case DType::kBFloat16:
      return sum_chunks_as<BFloat16>(row, begin, end, want, sums);
    default:
      return sum_chunks_as<Float16>(row, begin, end, want, sums);
  }
}

}  // namespace
}  // namespace dlm::cpu::DLM_NAMESPACE
