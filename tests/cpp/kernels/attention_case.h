// SPDX-License-Identifier: Apache-2.0
// Random arguments of block_attention and what the definition, in float64, says of them. Whatever
// no row sees holds NaN, in the caches as in the rows of q without a slot.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/block_attention.cuh"
#include "reference.h"

namespace check {

struct AttentionShape {
  int64_t B = 2, Q = 5, S = 90, H = 4, G = 2, D = 64;
  enum Mode {
    kFull,
    kRanges,
    kCausal,
    kBlockCausal,
    kOrder,
    kWindow,
    kCap,
    kHighCap,
    kHugeCap,
    kModes
  };
  int mode = kFull;
  bool fresh = true;       // new rows are written
  bool scattered = false;  // to slots in no order, some rows without one
  bool twice = false;      // two rows name the same slot
  bool moved = false;      // batch rows have other cache rows, of three the second none
  bool infinite = false;   // a V row that only some rows see holds NaN and infinities
  int64_t shift = 0;       // everything stands so many slots further right
  int64_t K = 0;           // new rows in slots of their own; 0: those of the queries
  bool hides = false;      // queries see some of the new rows
  int64_t gap = 1;         // gaps between rows are multiples of so many 16 bytes
};

template <class T>
constexpr dlm::DType kTypeOf = std::is_same_v<T, float>           ? dlm::DType::kFloat32
                               : std::is_same_v<T, dlm::BFloat16> ? dlm::DType::kBFloat16
                                                                  : dlm::DType::kFloat16;

template <class T>
struct AttentionCase {
  // Worst error of a result against max(1, |result|): twice what rounding the weights to T, and
  // the result once more, explains; in float32, what sums of 512 products do.
  static constexpr double kTolerance = std::is_same_v<T, float>           ? 4e-6
                                       : std::is_same_v<T, dlm::BFloat16> ? 1.6e-2
                                                                          : 2e-3;
  static constexpr double kLseTolerance = 4e-6;

  static constexpr int64_t kRanges = 3;

  AttentionShape s;
  dlm::BlockAttentionParams p{};
  Array<T> q, k_new, v_new, k_cache, v_cache, out;
  Array<float> lse, workspace;
  Array<int32_t> cache_rows, slots, ranges, origin, limit, order, k_slots, visible;
  std::vector<T> k_expected, v_expected;

  explicit AttentionCase(const AttentionShape& shape, uint64_t seed)
      : s(shape),
        out(count(s.B, s.Q, s.H, s.D), number(NAN)),
        lse(count(s.B, s.Q, s.H, 1), NAN),
        cache_rows(size_t(s.B)),
        slots(count(s.B, s.Q, 1, 1)),
        ranges(count(s.B, kRanges, 2, 1)),
        origin(size_t(s.B)),
        limit(count(s.B, s.Q, 1, 1)),
        order(count(s.B, s.S, 1, 1)),
        k_slots(count(s.B, new_rows(), 1, 1)),
        visible(count(s.B, s.Q, (new_rows() + 31) / 32, 1)) {
    Random random(seed);
    fill(q, p.q_stride, s.Q, s.H, random);
    fill(k_new, p.k_new_stride, new_rows(), s.G, random);
    fill(v_new, p.v_new_stride, new_rows(), s.G, random);
    fill(k_cache, p.k_cache_stride, s.S, s.G, random);
    fill(v_cache, p.v_cache_stride, s.S, s.G, random);
    set_params(random);
    for (int64_t b = 0; b < s.B; ++b) place(b, random);
    p.slots = slots.data();
    if (s.K) p.k_slots = k_slots.data();
    for (int32_t& word : visible) word = int32_t(random.word());
    if (s.hides) p.visible = visible.data();
    for (int64_t b = 0; b < s.B; ++b) cache_rows[size_t(b)] = int32_t(s.B - 1 - b);
    if (s.B >= 3) cache_rows[1] = -1;
    p.C = s.B, p.cache_rows = s.moved ? cache_rows.data() : nullptr;
    if (s.infinite) spoil();
    poison();
    expect_scatter();
    workspace = Array<float>(size_t(dlm::cuda::attend_workspace(p)), NAN);
  }

  int64_t new_rows() const { return s.K ? s.K : s.Q; }

  // Where a head's row starts.
  static size_t at(const int64_t* stride, int64_t b, int64_t row, int64_t head) {
    return size_t(b * stride[0] + row * stride[1] + head * stride[2]);
  }

  void start(dlm::cuda::AttendForm form) {
    run(dlm::cuda::start_block_attention(dlm::cuda::attend_params(p, form, workspace.data()),
                                         workspace.data(), nullptr));
  }

  // What differs from the definition, or "".
  std::string wrong() const {
    if (different(k_cache, k_expected)) return "k_cache is not what the scatter should leave";
    if (different(v_cache, v_expected)) return "v_cache is not what the scatter should leave";
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t i = 0; i < s.Q; ++i) {
        for (int64_t h = 0; h < s.H; ++h) {
          const std::string text = wrong_row(b, i, h);
          if (!text.empty()) return text;
        }
      }
    }
    return "";
  }

  bool sees(int64_t b, int64_t i, int64_t slot) const {
    const int64_t own = p.slot_of(b, i);
    bool in = !p.kv_range;
    for (int64_t n = 0; p.kv_range && n < p.N; ++n) {
      in |= slot >= p.kv_range[(b * p.N + n) * 2] && slot < p.kv_range[(b * p.N + n) * 2 + 1];
    }
    if (own < 0 || !in) return false;
    if (p.causal_block > 0) {
      const auto block = [&](int64_t x) {
        const int64_t from = p.block_origin.at(b, 0);
        return x < from ? -1 : (x - from) / p.causal_block;
      };
      if (block(slot) > block(own)) return false;
    }
    if (p.window_left >= 0 && slot < own - p.window_left) return false;
    if (p.window_right >= 0 && slot > own + p.window_right) return false;
    for (int64_t row = 0; p.visible && row < p.K; ++row) {
      if (p.new_slot_of(b, row) == slot && !p.shows(b, i, row)) return false;
    }
    return !p.k_order || p.k_order[b * s.S + slot] <= p.q_limit[b * s.Q + i];
  }

 private:
  static size_t count(int64_t a, int64_t b, int64_t c, int64_t d) { return size_t(a * b * c * d); }
  static T number(float x) { return dlm::from_float<T>(x); }

  // A tensor [B, rows, heads, D], by chance a view of [B, heads, rows, D]. Behind heads, rows and
  // requests are gaps as no other tensor has, which hold NaN.
  void fill(Array<T>& tensor, int64_t* stride, int64_t rows, int64_t heads, Random& random) {
    const bool by_rows = random.below(2);
    int64_t &inner = stride[by_rows ? 2 : 1], &outer = stride[by_rows ? 1 : 2];
    const auto next_gap = [&] { return ++gaps_ * s.gap * 16 / int64_t(sizeof(T)); };
    inner = s.D + next_gap();
    outer = (by_rows ? heads : rows) * inner + next_gap();
    stride[0] = (by_rows ? rows : heads) * outer + next_gap();
    const bool empty = s.B * rows * heads == 0;
    tensor =
        Array<T>(empty ? 0 : at(stride, s.B - 1, rows - 1, heads - 1) + size_t(s.D), number(NAN));
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          T* row = &tensor[at(stride, b, i, h)];
          for (int64_t d = 0; d < s.D; ++d) row[d] = number(float(random.normal()));
        }
      }
    }
  }

  void set_params(Random& random) {
    p.dtype = kTypeOf<T>;
    p.B = s.B, p.Q = s.Q, p.K = new_rows(), p.S = s.S, p.H = s.H, p.G = s.G, p.D = s.D;
    p.q = q.data(), p.k_cache = k_cache.data(), p.v_cache = v_cache.data();
    if (s.fresh) p.k_new = k_new.data(), p.v_new = v_new.data();
    p.out = out.data(), p.lse = lse.data();
    p.window_left = p.window_right = -1;
    p.scale = float(random.uniform(0.7, 1.3) / std::sqrt(double(s.D)));
    using Shape = AttentionShape;
    if (s.mode != Shape::kFull || s.shift) p.kv_range = ranges.data(), p.N = kRanges;
    if (s.mode == Shape::kCausal) p.causal_block = 1;
    if (s.mode == Shape::kBlockCausal) {
      p.causal_block = 3 + random.below(4), p.block_origin = per_row(origin, random);
    }
    if (s.mode == Shape::kOrder) p.q_limit = limit.data(), p.k_order = order.data();
    if (s.mode == Shape::kWindow)
      p.window_left = 12 + random.below(9), p.window_right = random.below(5);
    if (s.mode == Shape::kCap) p.softcap = float(random.uniform(1.5, 3.5));
    if (s.mode == Shape::kHighCap) p.softcap = float(random.uniform(3000.0, 9000.0));
    if (s.mode == Shape::kHugeCap) p.softcap = 3e38f;  // times log2(e) it is no float
  }

  // The block of new rows, ranges and orders of one request; the first request's row is the last.
  void place(int64_t b, Random& random) {
    const int64_t S = s.S - s.shift, room = S - s.Q;
    const int64_t first = s.shift + (room > 0 ? int64_t(random.below(uint32_t(room + 1))) : 0);
    for (int64_t i = 0; i < s.Q; ++i) {
      int64_t slot = first + i;
      if (s.scattered) slot = i % 5 == 3 ? -1 : first + (i * 7 + 3) % s.Q;
      slots[size_t(b * s.Q + i)] = slot < s.S ? int32_t(slot) : -1;
      limit[size_t(b * s.Q + i)] = int32_t(random.below(8));
    }
    for (int64_t i = 0; i < s.K; ++i) {
      const int64_t slot = s.shift + (first + 5 * i) % S;
      k_slots[size_t(b * s.K + i)] = i % 6 == 4 ? -1 : int32_t(slot);
    }
    if (s.twice) slots[size_t(b * s.Q + s.Q - 1)] = slots[size_t(b * s.Q)];
    for (int64_t j = 0; j < s.S; ++j) order[size_t(b * s.S + j)] = int32_t(random.below(10));
    origin[size_t(b)] = int32_t(s.shift + random.below(7));
    // One behind the other, the slots from `shift` on; with kRanges something is missing before,
    // between and behind them, and a range may be empty.
    int32_t* r = &ranges[size_t(b * 2 * kRanges)];
    r[0] = int32_t(s.shift), r[5] = int32_t(s.S);
    r[1] = r[2] = int32_t(s.shift + S / 3);
    r[3] = r[4] = int32_t(s.shift + S * 2 / 3);
    if (s.mode == AttentionShape::kRanges) {
      const auto some = [&] { return int32_t(random.below(uint32_t(S / 6 + 1))); };
      r[0] += some(), r[1] -= some(), r[2] += some(), r[3] -= some(), r[5] -= some();
      if (random.below(4) == 0) r[1] = r[0];
    }
  }

  // NaN and both infinities in a V row that is written, or is the last of all; where queries see
  // some of the new rows, NaN in a column of each.
  void spoil() {
    for (int64_t b = 0; b < s.B; ++b) {
      T* row = s.fresh ? &v_new[at(p.v_new_stride, b, new_rows() - 1, 0)]
                       : &v_cache[at(p.v_cache_stride, p.cache_row(b), s.S - 1, 0)];
      row[0] = number(NAN), row[s.D - 1] = number(INFINITY), row[s.D / 2] = number(-INFINITY);
      for (int64_t i = 0; s.hides && i < new_rows(); ++i)
        v_new[at(p.v_new_stride, b, i, 0) + size_t(i % s.D)] = number(NAN);
    }
  }

  void poison() {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t slot = 0; p.is_used(b) && slot < s.S; ++slot) {
        bool seen = false, written = false;
        for (int64_t i = 0; i < s.Q; ++i) seen |= sees(b, i, slot);
        for (int64_t i = 0; i < p.K; ++i) written |= s.fresh && p.new_slot_of(b, i) == slot;
        for (int64_t g = 0; (!seen || written) && g < s.G; ++g) {
          spoil(&k_cache[at(p.k_cache_stride, p.cache_row(b), slot, g)]);
          spoil(&v_cache[at(p.v_cache_stride, p.cache_row(b), slot, g)]);
        }
      }
      for (int64_t i = 0; i < s.Q; ++i) {
        if (p.slot_of(b, i) >= 0) continue;
        for (int64_t h = 0; h < s.H; ++h) spoil(&q[at(p.q_stride, b, i, h)]);
      }
    }
  }
  void spoil(T* row) const { std::fill(row, row + s.D, number(NAN)); }

  void expect_scatter() {
    k_expected.assign(k_cache.begin(), k_cache.end());
    v_expected.assign(v_cache.begin(), v_cache.end());
    for (int64_t b = 0; s.fresh && b < s.B; ++b) {
      for (int64_t i = 0; i < p.K; ++i) {
        const int64_t slot = p.new_slot_of(b, i);
        if (slot < 0) continue;
        for (int64_t g = 0; g < s.G; ++g) {
          std::copy_n(&k_new[at(p.k_new_stride, b, i, g)], s.D,
                      &k_expected[at(p.k_cache_stride, p.cache_row(b), slot, g)]);
          std::copy_n(&v_new[at(p.v_new_stride, b, i, g)], s.D,
                      &v_expected[at(p.v_cache_stride, p.cache_row(b), slot, g)]);
        }
      }
    }
  }

  static bool different(const Array<T>& got, const std::vector<T>& want) {
    return !want.empty() && std::memcmp(got.data(), want.data(), want.size() * sizeof(T)) != 0;
  }

  std::string wrong_row(int64_t b, int64_t i, int64_t h) const {
    const int64_t g = h / (s.H / s.G), row = (b * s.Q + i) * s.H + h;
    const T* query = &q[at(p.q_stride, b, i, h)];
    double maximum = -INFINITY, total = 0;
    std::vector<double> logit(size_t(s.S), -INFINITY), want(size_t(s.D), 0.0);
    std::vector<bool> seen(size_t(s.S), false);
    for (int64_t slot = 0; slot < s.S; ++slot) {
      if (!sees(b, i, slot)) continue;
      const T* key = &k_expected[at(p.k_cache_stride, p.cache_row(b), slot, g)];
      double dot = 0;
      for (int64_t d = 0; d < s.D; ++d)
        dot += double(dlm::to_float(query[d])) * dlm::to_float(key[d]);
      dot *= p.scale;
      if (p.softcap > 0) dot = p.softcap * std::tanh(dot / p.softcap);
      seen[size_t(slot)] = true;
      logit[size_t(slot)] = dot;
      maximum = std::fmax(maximum, dot);
    }
    for (int64_t slot = 0; slot < s.S; ++slot) {
      if (!seen[size_t(slot)]) continue;
      const double weight = std::exp(logit[size_t(slot)] - maximum);
      total += weight;
      const T* value = &v_expected[at(p.v_cache_stride, p.cache_row(b), slot, g)];
      for (int64_t d = 0; d < s.D; ++d) want[size_t(d)] += weight * dlm::to_float(value[d]);
    }
    const double want_lse = total > 0 ? maximum + std::log(total) : -INFINITY;
    if (!close(lse[size_t(row)], want_lse, kLseTolerance)) {
      return difference("lse", b, i, h, -1, lse[size_t(row)], want_lse);
    }
    for (int64_t d = 0; d < s.D; ++d) {
      const double value = total > 0 ? want[size_t(d)] / total : 0.0;
      const double got = dlm::to_float(out[size_t(row * s.D + d)]);
      if (!close(got, value, kTolerance)) return difference("out", b, i, h, d, got, value);
    }
    return "";
  }

  std::string difference(const char* name, int64_t b, int64_t i, int64_t h, int64_t d, double got,
                         double want) const {
    char text[200];
    snprintf(text, sizeof text, "%s[%d, %d, %d, %d] is %g, expected %g (Q %d, S %d, D %d, mode %d)",
             name, int(b), int(i), int(h), int(d), got, want, int(s.Q), int(s.S), int(s.D), s.mode);
    return text;
  }

  int64_t gaps_ = 0;
};

}  // namespace check
