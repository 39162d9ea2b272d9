// SPDX-License-Identifier: Apache-2.0
// out = softmax(cap(scale * q.k)) . v over the slots a query sees, lse = log sum exp, by an online
// softmax (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018) in fp32.
// Work item: a batch row, a KV head and 32 rows. A row is one query of one of the H/G heads that
// share the KV head, so a K or V tile is converted to fp32 once for all of them.
// Both products run as c[r][:] += a[r][k] * b[k][:], whose inner loop vectorizes without reordering
// a sum: the K tile is transposed on conversion (b = K^T), the V tile is used as it is.
// Tiles of 64 slots start at the first attended slot, and a slot that a row does not see adds exact
// zeros, so a row's bits depend neither on neighboring rows nor on left padding.
// Flops: 4 D per row and visible slot. Bytes: 2 D elements per slot and 32 rows. With 32 rows this
// is 32 flops per byte of bf16, so arithmetic is the limit; with few rows it is the conversion.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/math.h"
#include "cpu/block_attention.h"
#include "cpu/block_attention_mask.h"

namespace dlm::cpu::generic {
namespace {

constexpr int64_t kRows = 32;  // rows of a work item
constexpr int64_t kLanes = 8;  // partial sums of a reduction
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Scratch {
  alignas(64) float q[kRows * kMaxHeadDim];    // [row][D]
  alignas(64) float acc[kRows * kMaxHeadDim];  // [row][D]
  alignas(64) float kv[kKeys * kMaxHeadDim];   // the K tile [D][kKeys], then the V tile [slot][D]
  alignas(64) float s[kRows * kKeys];          // logits, then weights
  alignas(64) float zeros[kMaxHeadDim];
  float m[kRows], l[kRows];         // running maximum, sum of exp(s - m)
  int64_t low[kRows], high[kRows];  // slots a row may see, [low, high), before ranges and order
  SlotMask seen[kRows];             // slots of the tile a row sees
};

// c[r][n] += sum over four k of a[r][k] * b[k][n]. The order of additions is the same for one row
// and for two, so a row's bits do not depend on its neighbor.
inline void add_products(const float* __restrict a, const float* __restrict b0,
                         const float* __restrict b1, const float* __restrict b2,
                         const float* __restrict b3, float* __restrict c, int64_t width) {
  const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  for (int64_t n = 0; n < width; ++n) {
    c[n] += (a0 * b0[n] + a1 * b1[n]) + (a2 * b2[n] + a3 * b3[n]);
  }
}
inline void add_products(const float* __restrict a, const float* __restrict aa,
                         const float* __restrict b0, const float* __restrict b1,
                         const float* __restrict b2, const float* __restrict b3,
                         float* __restrict c, float* __restrict cc, int64_t width) {
  const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  const float aa0 = aa[0], aa1 = aa[1], aa2 = aa[2], aa3 = aa[3];
  for (int64_t n = 0; n < width; ++n) {
    c[n] += (a0 * b0[n] + a1 * b1[n]) + (a2 * b2[n] + a3 * b3[n]);
    cc[n] += (aa0 * b0[n] + aa1 * b1[n]) + (aa2 * b2[n] + aa3 * b3[n]);
  }
}

// c[r][n] += sum over k of a[r][k] * b[k][n]; depth is a multiple of 4.
void multiply_add(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                  int64_t c_stride, int64_t rows, int64_t depth, int64_t width) {
  for (int64_t k = 0; k < depth; k += 4) {
    const float *b0 = b + k * b_stride, *b1 = b0 + b_stride, *b2 = b1 + b_stride,
                *b3 = b2 + b_stride;
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      const float* row = a + r * a_stride + k;
      float* sum = c + r * c_stride;
      add_products(row, row + a_stride, b0, b1, b2, b3, sum, sum + c_stride, width);
    }
    if (r < rows) add_products(a + r * a_stride + k, b0, b1, b2, b3, c + r * c_stride, width);
  }
}

// The same product for a V tile that contains NaN or infinities: a row must not even multiply by
// zero what it does not see.
void multiply_add_seen(const Scratch& t, float* acc, int64_t rows, int64_t depth, int64_t D) {
  for (int64_t r = 0; r < rows; ++r) {
    auto value = [&](int64_t k) { return t.seen[r] >> k & 1 ? t.kv + k * D : t.zeros; };
    for (int64_t k = 0; k < depth; k += 4) {
      add_products(t.s + r * kKeys + k, value(k), value(k + 1), value(k + 2), value(k + 3),
                   acc + r * D, D);
    }
  }
}

// Converts the K tile to [D][kKeys]; slots that no row needs are not read.
template <class T>
void load_keys(const T* k, int64_t stride, SlotMask needed, int64_t width, int64_t D, float* tile) {
  constexpr int64_t kStep = 8;  // converted by rows, transposed while in the first-level cache
  float rows[kKeys * kStep];
  for (int64_t d = 0; d < D; d += kStep) {
    for (int64_t j = 0; j < width; ++j) {
      if (needed >> j & 1) {
        const T* from = k + j * stride + d;
        for (int64_t i = 0; i < kStep; ++i) rows[j * kStep + i] = to_float(from[i]);
      } else {
        std::fill_n(rows + j * kStep, kStep, 0.0f);
      }
    }
    for (int64_t i = 0; i < kStep; ++i) {
      for (int64_t j = 0; j < width; ++j) tile[(d + i) * kKeys + j] = rows[j * kStep + i];
    }
  }
}

// Converts the V tile to [slot][D]; returns true if all of it is finite.
template <class T>
bool load_values(const T* v, int64_t stride, SlotMask needed, int64_t width, int64_t D,
                 float* tile) {
  uint32_t overflow = 0;  // top bit: an exponent of all ones was found
  for (int64_t j = 0; j < width; ++j) {
    float* to = tile + j * D;
    if (needed >> j & 1) {
      const T* from = v + j * stride;
      for (int64_t d = 0; d < D; ++d) {
        to[d] = to_float(from[d]);
        overflow |= (float_to_bits(to[d]) & 0x7fffffffu) + 0x00800000u;
      }
    } else {
      std::fill_n(to, D, 0.0f);
    }
  }
  return !(overflow >> 31);
}

// Processes one tile of one row: turns logits into weights in place, updates m and l, and returns
// the factor by which the previous sums shrink. Reductions run in kLanes fixed lanes, so unseen
// slots change no bit.
float online_softmax(const BlockAttentionParams& p, float* s, SlotMask seen, int64_t width,
                     float* m, float* l) {
  if (!seen) {
    std::fill_n(s, width, 0.0f);
    return 1.0f;
  }
  for (int64_t j = 0; j < width; ++j) s[j] *= p.scale;
  if (p.softcap > 0) {
    for (int64_t j = 0; j < width; ++j) s[j] = p.softcap * plain_tanh(s[j] / p.softcap);
  }
  if (seen != ~SlotMask(0)) {
    for (int64_t j = 0; j < width; ++j) s[j] = seen >> j & 1 ? s[j] : -kInfinity;
  }
  float lane[kLanes];
  std::fill_n(lane, kLanes, *m);
  for (int64_t j = 0; j < width; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] = s[j + i] > lane[i] ? s[j + i] : lane[i];
  }
  const float maximum = *std::max_element(lane, lane + kLanes);
  // Only NaN and -inf so far: any finite number can be subtracted.
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  const float shrink = plain_exp(*m - base);
  for (int64_t j = 0; j < width; ++j) s[j] = plain_exp(s[j] - base);
  std::fill_n(lane, kLanes, 0.0f);
  for (int64_t j = 0; j < width; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] += s[j + i];
  }
  const float sum =
      ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  *m = maximum;
  *l = *l * shrink + sum;
  return shrink;
}

template <class T>
void attend(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  Scratch t;
  const int64_t D = p.D, group = p.H / p.G, all_rows = p.Q * group;
  const int64_t tiles = (all_rows + kRows - 1) / kRows;
  std::fill_n(t.zeros, D, 0.0f);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / tiles / p.G, g = item / tiles % p.G, first_row = item % tiles * kRows;
    const int64_t rows = std::min(kRows, all_rows - first_row);
    auto query = [&](int64_t r) { return (first_row + r) / group; };
    auto head = [&](int64_t r) { return g * group + (first_row + r) % group; };
    const int64_t cached = p.cache_row(b);
    const T* k =
        static_cast<const T*>(p.k_cache) + cached * p.k_cache_stride[0] + g * p.k_cache_stride[2];
    const T* v =
        static_cast<const T*>(p.v_cache) + cached * p.v_cache_stride[0] + g * p.v_cache_stride[2];
    const Ranges ranges(p, b);
    const NewRows new_rows(p, b);

    int64_t first = p.S, last = 0;  // union of what the item's rows may see
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(p.q) + b * p.q_stride[0] + query(r) * p.q_stride[1] +
                      head(r) * p.q_stride[2];
      for (int64_t d = 0; d < D; ++d) t.q[r * D + d] = to_float(from[d]);
      interval(p, b, query(r), &t.low[r], &t.high[r]);
      if (t.low[r] < t.high[r]) {
        first = std::min(first, t.low[r]);
        last = std::max(last, t.high[r]);
      }
    }
    std::fill_n(t.acc, rows * D, 0.0f);
    std::fill_n(t.m, rows, -kInfinity);
    std::fill_n(t.l, rows, 0.0f);

    int64_t grid, attended_end;
    ranges.hull(&grid, &attended_end);
    last = std::min(last, attended_end);
    for (int64_t slot = grid + std::max<int64_t>(first - grid, 0) / kKeys * kKeys; slot < last;
         slot += kKeys) {
      const SlotMask attended = ranges.tile(slot);
      SlotMask needed = 0;
      for (int64_t r = 0; r < rows && attended; ++r) {
        if (r > 0 && query(r) == query(r - 1)) {
          t.seen[r] = t.seen[r - 1];
          continue;
        }
        t.seen[r] = attended & bits_between(t.low[r] - slot, t.high[r] - slot);
        if (p.k_order && t.seen[r]) {
          t.seen[r] &= in_order(p, b, slot, p.q_limit[b * p.Q + query(r)]);
        }
        if (new_rows.touch(slot)) t.seen[r] &= ~new_rows.hidden(query(r), slot);
        needed |= t.seen[r];
      }
      if (!needed) continue;
      int64_t width = kKeys;  // up to the last needed slot, rounded up to whole lanes
      while (!(needed >> (width - kLanes))) width -= kLanes;

      load_keys(k + slot * p.k_cache_stride[1], p.k_cache_stride[1], needed, width, D, t.kv);
      std::fill_n(t.s, rows * kKeys, 0.0f);
      multiply_add(t.q, D, t.kv, kKeys, t.s, kKeys, rows, D, width);
      for (int64_t r = 0; r < rows; ++r) {
        const float shrink = online_softmax(p, t.s + r * kKeys, t.seen[r], width, &t.m[r], &t.l[r]);
        if (shrink == 1.0f) continue;
        for (int64_t d = 0; d < D; ++d) t.acc[r * D + d] *= shrink;
      }
      if (load_values(v + slot * p.v_cache_stride[1], p.v_cache_stride[1], needed, width, D,
                      t.kv)) {
        multiply_add(t.s, kKeys, t.kv, D, t.acc, D, rows, width, D);
      } else {
        multiply_add_seen(t, t.acc, rows, width, D);
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = (b * p.Q + query(r)) * p.H + head(r);
      T* out = static_cast<T*>(p.out) + row * D;
      if (t.l[r] == 0.0f) {  // the row saw nothing
        std::fill_n(out, D, from_float<T>(0.0f));
        p.lse[row] = -kInfinity;
        continue;
      }
      // + 0: makes a sum that underflowed +0, whichever sign it had before tiles of zeros were
      // added
      for (int64_t d = 0; d < D; ++d) out[d] = from_float<T>(t.acc[r * D + d] / t.l[r] + 0.0f);
      p.lse[row] = (t.m[r] == -kInfinity ? 0.0f : t.m[r]) + std::log(t.l[r]);
    }
  }
}

template <class T>
void scatter(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.G, g = item % p.G;
    auto copy_row = [&](const void* from, const int64_t* from_stride, void* to,
                        const int64_t* to_stride, int64_t row, int64_t slot) {
      std::memcpy(static_cast<T*>(to) + p.cache_row(b) * to_stride[0] + slot * to_stride[1] +
                      g * to_stride[2],
                  static_cast<const T*>(from) + b * from_stride[0] + row * from_stride[1] +
                      g * from_stride[2],
                  p.D * sizeof(T));
    };
    // One item processes all rows in order: of rows that name the same slot, the last one is kept.
    for (int64_t row = 0; row < p.K; ++row) {
      const int64_t slot = p.new_slot_of(b, row);
      if (slot < 0) continue;
      copy_row(p.k_new, p.k_new_stride, p.k_cache, p.k_cache_stride, row, slot);
      copy_row(p.v_new, p.v_new_stride, p.v_cache, p.v_cache_stride, row, slot);
    }
  }
}

BlockAttentionWork work(const BlockAttentionParams& p) {
  return {p.B * p.G * ((p.Q * (p.H / p.G) + kRows - 1) / kRows), 0, 0};
}

}  // namespace

void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  params.dtype == DType::kFloat32 ? scatter<float>(params, begin, end)
                                  : scatter<uint16_t>(params, begin, end);
}

BlockAttentionKernels block_attention(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {work, attend<BFloat16>, nullptr};
    case DType::kFloat16:
      return {work, attend<Float16>, nullptr};
    default:
      return {work, attend<float>, nullptr};
  }
}

}  // namespace dlm::cpu::generic
