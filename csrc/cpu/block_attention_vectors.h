// SPDX-License-Identifier: Apache-2.0
// Block attention in vectors of sixteen elements: each file for one instruction set includes this
// after its simd_*.h. Both products run as c[n][rows] += a[i][rows] * b[n][i]. The lanes of a
// vector are query rows (16, or 4 with 4 lanes each), and b is broadcast from memory: K in the
// cache's own layout, V converted (for bf16, with two slots interleaved) once for all rows of an
// item, tile by tile.
//
// Work item: a batch row, a KV head, and up to 512 rows (of all heads that share it). If that makes
// few items, they are also divided into spans of up to 512 slots. Spans are summed separately and
// merged in order whether they are divided or not, so a row's bits depend only on what it sees.
//
// The cache is [B,S,G,D] with any strides, in its own dtype, so that a block's rows can be written
// as a layer computes them. A tiled layout would save the conversion, which takes 5 % (28/4 heads)
// to 8 % (32/32) of a call. Flops: 4 D per row and slot; bytes: 2 D elements per slot. With 32 rows
// of bf16 (32 flops per byte) arithmetic is the limit, with 4 rows it is memory. The words of the
// products are floats or, where that is faster, pairs of bf16: vdpbf16ps reaches twice the flops of
// fp32 FMA on AMD's Zen 5 (474 compared with 239 GFLOP/s per core), but half of them on Intel's
// Sapphire Rapids; isa.cpp chooses. PairWords needs AVX512_BF16.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/block_attention.h"
#include "cpu/block_attention_mask.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

constexpr int64_t kLanes = kWidth;
constexpr int64_t kTileRows = 2 * kLanes;        // rows of a row tile: two vectors
constexpr int64_t kMaxRows = 512;                // rows of a work item,
constexpr int64_t kRowElements = 32 * 1024;      // ... and rows times D
constexpr int64_t kMaxSpan = 512;                // slots of a span,
constexpr int64_t kPackWords = 32 * 1024;        // ... and words of its keys, or its values
constexpr int64_t kMaxTiles = kMaxSpan / kKeys;  // key tiles of a span
constexpr int64_t kManyItems = 32;               // enough to keep all cores busy,
constexpr int64_t kMaxSplits = 64;  // ... if keys are not split into more spans than this
constexpr int64_t kCopies = 4;      // lanes of a row if there are few rows
// Measured with AVX2: the work for which two threads take as long as one. (Estimated at twice that
// for AVX-512.)
constexpr int64_t kGrain = int64_t(1) << (kManyRegisters ? 19 : 18);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
alignas(64) constexpr float kOnes[kTileRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The unit of the products: words of one float, or of a pair of bf16 elements (along D in q.k,
// along the slots in p.v). With tile registers (block_attention_amx.cpp), D and the slots of a key
// tile come in zero-padded blocks, and that many words of slots are adjacent in the values.
template <class F>
constexpr int64_t kBlock = F::kTiles ? 2 * kLanes : 8;
template <class F>
constexpr int64_t kSlotWords = F::kTiles ? kLanes : 1;

template <class T>
struct FloatWords {
  using Element = T;
  static constexpr bool kTiles = false;
  static constexpr int64_t kElements = 1;             // elements per word
  static constexpr int64_t kChains = 2, kDepth = 32;  // interleaved sums; words per sum
  static constexpr uint32_t kSign = 0x80000000u;

  // Whether rows `stride` elements apart can be read as words.
  static bool are_words(const T*, int64_t) { return sizeof(T) == sizeof(uint32_t); }
  static Words words(const T* p) { return bits(load(p)); }
  static Words words(const T* p, int64_t n) { return bits(load_first(n, p)); }
  // Writes `n` words of the values for one word of slots. `worst` is the largest magnitude so far.
  static void values(const T* const* row, int64_t n, uint32_t* to, Words* worst) {
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
      const Words x = words(row[0] + d);
      *worst = max(*worst, x & 0x7fffffffu);
      store(to + d, x);
    }
    if (d < n) {
      const Words x = words(row[0] + d, n - d);
      *worst = max(*worst, x & 0x7fffffffu);
      store_first(n - d, to + d, x);
    }
  }
  static bool finite(Words worst) { return to_bits(at_most(splat(0x7f800000u), worst)) == 0; }
  static Words or_zero(Words x) {  // zero where it is not finite
    return select(at_most(splat(0x7f800000u), x & 0x7fffffffu), splat(0u), x);
  }
  static Floats dot(Words a, Words b, Floats sum) { return fma(from_bits(a), from_bits(b), sum); }
  // Weights of four slots, from one vector each, or from one vector that has them side by side.
  static void weights(const Floats* p, Words* to) {
    for (int i = 0; i < 4; ++i) to[i] = bits(p[i]);
  }
  static void weights_of_four(Floats p, Words* to) {
    to[0] = bits(one_of_four<0>(p)), to[1] = bits(one_of_four<1>(p));
    to[2] = bits(one_of_four<2>(p)), to[3] = bits(one_of_four<3>(p));
  }
  static Floats weight(const uint32_t* weights, int64_t stride, int64_t j) {  // weight of slot j
    return from_bits(load(weights + j * stride));
  }
};

#ifdef __AVX512BF16__
struct PairWords {
  using Element = BFloat16;
  static constexpr bool kTiles = false;
  static constexpr int64_t kElements = 2, kChains = 1, kDepth = 64;
  static constexpr uint32_t kSign = 0x80008000u;

  static bool are_words(const BFloat16* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 4 == 0 && stride % 2 == 0;
  }
  static Words words(const BFloat16* p) { return load(reinterpret_cast<const uint32_t*>(p)); }
  static Words words(const BFloat16* p, int64_t n) {
    return load_first(n, reinterpret_cast<const uint32_t*>(p));
  }
  static void values(const BFloat16* const* row, int64_t n, uint32_t* to, Words* worst) {
    constexpr int64_t kStep = 2 * kLanes;
    Words low, high;
    int64_t d = 0;
    for (; d + kStep <= n; d += kStep) {
      interleave(words(row[0] + d), words(row[1] + d), &low, &high);
      *worst = max_halves(max_halves(*worst, low & 0x7fff7fffu), high & 0x7fff7fffu);
      store(to + d, low);
      store(to + d + kLanes, high);
    }
    if (d < n) {
      const int64_t left = n - d;
      interleave(words(row[0] + d, left / 2), words(row[1] + d, left / 2), &low, &high);
      *worst = max_halves(max_halves(*worst, low & 0x7fff7fffu), high & 0x7fff7fffu);
      store_first(left, to + d, low);
      if (left > kLanes) store_first(left - kLanes, to + d + kLanes, high);
    }
  }
  static bool finite(Words worst) {
    return to_bits(at_most(splat(0x7f80u), max(worst >> 16, worst & 0xffffu))) == 0;
  }
  static Words or_zero(Words x) {
    const Words low = select(at_most(splat(0x7f80u), x & 0x7fffu), splat(0u), x & 0xffffu);
    return low | select(at_most(splat(0x7f800000u), x & 0x7fffffffu), splat(0u), x & 0xffff0000u);
  }
  static Floats dot(Words a, Words b, Floats sum) { return dot_pairs(a, b, sum); }
  static void weights(const Floats* p, Words* to) {
    to[0] = pairs(p[0], p[1]), to[1] = pairs(p[2], p[3]);
  }
  static void weights_of_four(Floats p, Words* to) { pairs_of_four(p, &to[0], &to[1]); }
  static Floats weight(const uint32_t* weights, int64_t stride, int64_t j) {
    const Words pair = load(weights + j / 2 * stride);
    return from_bits(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }
};
#endif

// Consecutive query rows of a KV head; a row is one query of one of its heads.
struct Rows {
  int64_t b, g, group, copies, first, count;
  int64_t query(int64_t r) const { return (first + r) / group; }
  int64_t head(int64_t r) const { return g * group + (first + r) % group; }
  // Number of lanes of a row tile's vectors. Up to four rows have four lanes each, used for sums of
  // four slots side by side in q.k, and of four elements of D in p.v. (The bits are the same.)
  int64_t lanes() const { return count > kLanes ? kTileRows : kLanes; }
};

// How a call is divided, determined only by its shape.
template <class F>
struct Plan {
  int64_t all_rows, rows, blocks;  // query rows per KV head, per work item; items they form
  int64_t tiles;                   // row tiles per work item
  int64_t D, words;                // of a key, rounded up to whole blocks
  int64_t span, spans, splits;     // slots per span; spans; items that the spans form

  explicit Plan(const BlockAttentionParams& p) {
    D = (p.D + kBlock<F> - 1) / kBlock<F> * kBlock<F>;
    words = D / F::kElements;
    span = std::min(kMaxSpan, kPackWords / words / kKeys * kKeys);
    spans = std::max<int64_t>(1, (p.S + span - 1) / span);
    all_rows = p.Q * (p.H / p.G);
    const int64_t most = std::min(kMaxRows, kRowElements / D / kTileRows * kTileRows);
    blocks = (all_rows + most - 1) / most;
    tiles = ((all_rows + blocks - 1) / blocks + kTileRows - 1) / kTileRows;
    rows = tiles * kTileRows;
    blocks = (all_rows + rows - 1) / rows;
    splits = p.B * p.G * blocks < kManyItems && spans <= kMaxSplits ? spans : 1;
  }

  // All rows of a work item.
  Rows rows_of(const BlockAttentionParams& p, int64_t item) const {
    const int64_t first = item % blocks * rows;
    const int64_t copies = !F::kTiles && all_rows <= kLanes / kCopies ? kCopies : 1;
    return {item / blocks / p.G,
            item / blocks % p.G,
            p.H / p.G,
            copies,
            first,
            std::min(rows, all_rows - first)};
  }
  // The rows of one of its row tiles.
  Rows rows_of(const BlockAttentionParams& p, int64_t item, int64_t tile) const {
    Rows r = rows_of(p, item);
    r.first += tile * kTileRows;
    r.count = std::min(kTileRows, r.count - tile * kTileRows);
    return r;
  }
};

// Sums over some of the slots: m is the largest logit (as stored, see Logits), l the sum of the
// weights.
struct State {
  float* acc;    // [D][lanes], or [D / kCopies][row][kCopies]
  float *m, *l;  // [lanes]

  static constexpr int64_t floats(int64_t D) { return (D + 2) * kTileRows; }
  State(float* at, int64_t D) : acc(at), m(at + D * kTileRows), l(at + (D + 1) * kTileRows) {}

  void clear(const Rows& rows, int64_t D) const {
    std::fill_n(acc, D / rows.copies * rows.lanes(), 0.0f);
    std::fill_n(m, rows.lanes(), -kInfinity);
    std::fill_n(l, rows.lanes(), 0.0f);
  }
};

struct Scratch {                           // 0.6 MB
  alignas(64) uint32_t q[kRowElements];    // [row tile][word of D][lane]
  alignas(64) uint32_t k[kPackWords];      // [slot][word of D], or [four slots][word of D][slot]
  alignas(64) uint32_t v[kPackWords];      // [word of slots][D], or [16 words][D][word]
  alignas(64) float s[kKeys * kTileRows];  // logits, then weights [slot, or word][lane]
  alignas(64) float sums[kRowElements + 2 * kMaxRows];         // a State for each row tile
  alignas(64) float more_sums[kTileRows * (kMaxHeadDim + 2)];  // the State of a later span
  alignas(64) float shrink[kTileRows];
  alignas(64) uint16_t zeros[kMaxHeadDim * 2];
  int64_t low[kMaxRows],
      high[kMaxRows];  // slots a row may see, [low, high), before ranges and order
  alignas(64) SlotMask seen[kTileRows];  // slots of the key tile a row sees
  Mask lanes[2][kKeys];                  // rows that see a slot
};

// Prefetches rows that will be needed while a product runs, one cache line at a time. Rows of a
// cache are far apart, so hardware does not prefetch them; fetching all at once would stall.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;  // in bytes; bytes per row; rows left
  int64_t at = 0;                           // offset in the row

  void step() {
    if (rows == 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
};

// c[n][:] = c[n][:] * before + sum over i of a[i][:] * b[n * b_out + i * b_in], n < kOut, in an
// order of i that does not depend on the template arguments; without `before`, c is not read. With
// kRepeat, every four lanes receive four words of b instead of one. Computes kVectors of the kAll
// vectors of rows.
template <class F, int kChains, int kAll, int kVectors, int kRepeat, int kOut>
DLM_SIMD void multiply(const uint32_t* a, const uint32_t* b, int64_t b_out, int64_t b_in,
                       int64_t depth, const float* before, float* c, Ahead* ahead) {
  constexpr int64_t kStride = kAll * kLanes;
  Ahead next = *ahead;
  Floats sum[kChains][kOut][kVectors];
#pragma GCC unroll 2
  for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 16
    for (int n = 0; n < kOut; ++n) {
#pragma GCC unroll 2
      for (int x = 0; x < kVectors; ++x) sum[chain][n][x] = splat(0.0f);
    }
  }
  for (int64_t i = 0; i < depth; i += kChains) {
    // As many as can arrive in time for the next product.
#pragma GCC unroll 4
    for (int r = 0; r < (kManyRegisters ? kRepeat : 1); ++r) {
      if (kChains * kVectors == 1 || i % 2 == 0) next.step();
    }
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      Words left[kVectors];
#pragma GCC unroll 2
      for (int x = 0; x < kVectors; ++x) left[x] = load(a + (i + chain) * kStride + x * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kOut; ++n) {
        const uint32_t* from = b + n * b_out + (i + chain) * b_in;
        const Words right = kRepeat == 1 ? splat(*from) : splat_four(from);
#pragma GCC unroll 2
        for (int x = 0; x < kVectors; ++x) {
          sum[chain][n][x] = F::dot(left[x], right, sum[chain][n][x]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < kOut; ++n) {
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; ++x) {
      float* to = c + n * kStride + x * kLanes;
      Floats all = sum[0][n][x];
      if (kChains == 2) all = all + sum[kChains - 1][n][x];
      store(to, before ? fma(load(to), load(before + x * kLanes), all) : all);
    }
  }
  *ahead = next;
}

// The same for all outputs and any depth: kSums sums hide the latency of a product, and short
// chains keep the rounding error of a sum small. Where a vector takes two registers there is room
// for six sums, or for four, which divide the few outputs of kRepeat. In that case only q.k has two
// chains, because its errors affect large logits, while weights are at most 1.
template <class F, bool kLogits, int kVectors, int kRepeat>
void multiply_all(const uint32_t* a, const uint32_t* b, int64_t b_out, int64_t b_in, int64_t depth,
                  const float* before, float* c, int64_t count, Ahead* ahead) {
  if constexpr (F::kTiles) {
    F::template multiply<kVectors>(a, b, b_out, b_in, depth, before, c, count, ahead);
  } else {
    constexpr int kChains = kManyRegisters || kLogits ? F::kChains : 1;
    constexpr int kAtOnce = kManyRegisters || !kLogits ? kVectors : 1;
    constexpr int64_t kSums = kManyRegisters ? 16 : kRepeat == 1 ? 6 : 4;
    constexpr int64_t kStride = kVectors * kLanes, kOut = kSums / (kAtOnce * kChains);
    // D and the slots are multiples of 8. If kOut does not divide such numbers, two smaller steps
    // finish the rest.
    constexpr int64_t kLeft = kManyRegisters ? 8 / kRepeat : kOut == 6 ? 4 : 2;
    constexpr int64_t kEnd = kOut % kLeft ? 2 * kLeft : 0;
    for (int64_t i = 0; i < depth; i += F::kDepth) {
      const int64_t part = std::min(F::kDepth, depth - i);
      for (int64_t x = 0; x < kStride; x += kAtOnce * kLanes) {
        const float* factor = before ? before + x : nullptr;
        int64_t n = 0;
        for (; n + kOut <= count && n + kEnd != count; n += kOut) {
          multiply<F, kChains, kVectors, kAtOnce, kRepeat, kOut>(
              a + x, b + n * b_out, b_out, b_in, part, factor, c + n * kStride + x, ahead);
        }
        for (; n < count; n += kLeft) {
          multiply<F, kChains, kVectors, kAtOnce, kRepeat, kLeft>(
              a + x, b + n * b_out, b_out, b_in, part, factor, c + n * kStride + x, ahead);
        }
      }
      a += part * kStride;
      b += part * b_in;
      before = kOnes;
    }
  }
}

Floats finite_base(Floats m) { return select(equal(m, splat(-kInfinity)), splat(0.0f), m); }

// A logit is `unit` times the stored value: q.k, or the hyperbolic tangent with a soft-cap. Only
// differences from the maximum are multiplied by the unit, so rounding errors are small where
// weights are large. (The sign of the scale is applied to the queries.) If a factor is 0, subnormal
// or infinite, multiplying by the unit would lose information, so the logits themselves are stored.
struct Logits {
  enum class Stored { kProducts, kTangents, kLogits };

  Stored stored;
  float scale, softcap;
  float cap;  // factor of q.k inside the hyperbolic tangent
  float unit, log2_unit;

  explicit Logits(const BlockAttentionParams& p)
      : stored(p.softcap > 0 ? Stored::kTangents : Stored::kProducts),
        scale(std::abs(p.scale)),
        softcap(p.softcap),
        cap(p.softcap > 0 ? scale / p.softcap : 1.0f),
        unit(p.softcap > 0 ? p.softcap : scale),
        log2_unit(unit * kLog2E) {
    if (std::isnormal(cap) && std::isnormal(log2_unit)) return;
    stored = Stored::kLogits, unit = 1.0f, log2_unit = kLog2E;
  }

  // Converts `count` vectors of q.k to stored values.
  void convert(float* s, int64_t stride, int64_t count) const {
    if (stored == Stored::kProducts) return;
    for (float* const end = s + count * stride; s != end; s += stride) {
      if (stored == Stored::kTangents) {
        store(s, tanh(load(s) * splat(cap)));
      } else {
        const Floats x = load(s) * splat(scale);
        store(s, softcap > 0 ? splat(softcap) * tanh(x / splat(softcap)) : x);
      }
    }
  }
  Floats weight(Floats x, Floats base) const {
    return exp2_nonpositive((x - base) * splat(log2_unit));
  }
};

// Processes one vector of rows over one key tile: turns logits into weights (as words), updates m
// and l, and returns the factor by which the previous sums shrink. `lanes` holds which rows see a
// slot; null means all. Sums over slots run in four parts, which are lanes where a row has four.
template <class F, int kRepeat>
void online_softmax(const Logits& logits, float* s, uint32_t* weights, int64_t stride,
                    int64_t width, const Mask* lanes, float* m, float* l, float* shrink) {
  constexpr int64_t kParts = 4 / kRepeat;
  const int64_t count = width / kRepeat;
  const Floats before = load(m);
  Floats top = before;
  logits.convert(s, stride, count);
  if (lanes) {
    for (int64_t j = 0; j < count; ++j) {
      store(s + j * stride, select(lanes[j], load(s + j * stride), splat(-kInfinity)));
    }
  }
  for (int64_t j = 0; j < count; ++j) top = max(load(s + j * stride), top);
  if (kRepeat == 4) top = max_of_four(top);
  // Only NaN and -inf so far: any finite number can be subtracted.
  const Floats base = finite_base(top), factor = logits.weight(before, base);
  Floats part[kParts];
  for (Floats& x : part) x = splat(0.0f);
  for (int64_t j = 0; j < count; j += kParts) {
    Floats e[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      e[i] = logits.weight(load(s + (j + i) * stride), base);
      part[i] = part[i] + e[i];
    }
    Words four_slots[4 / F::kElements];
    kRepeat == 1 ? F::weights(e, four_slots) : F::weights_of_four(e[0], four_slots);
#pragma GCC unroll 4
    for (const Words& x : four_slots) {
      store(weights, x);
      weights += stride;
    }
  }
  Floats sum;
  if constexpr (kRepeat == 1) {
    sum = (part[0] + part[1]) + (part[2] + part[3]);
  } else {
    sum = sum_of_four(part[0]);
  }
  store(m, top);
  store(l, load(l) * factor + sum);
  store(shrink, factor);
}

// Merges b, which covers other slots, into a.
void merge(const Logits& logits, const State& a, const State& b, const Rows& rows, int64_t D) {
  const int64_t lanes = rows.lanes();
  for (int64_t x = 0; x < lanes; x += kLanes) {
    const Floats am = load(a.m + x), bm = load(b.m + x), m = max(am, bm), base = finite_base(m);
    const Floats fa = logits.weight(am, base), fb = logits.weight(bm, base);
    store(a.m + x, m);
    store(a.l + x, load(a.l + x) * fa + load(b.l + x) * fb);
    for (int64_t i = x; i < D / rows.copies * lanes; i += lanes) {
      store(a.acc + i, load(a.acc + i) * fa + load(b.acc + i) * fb);
    }
  }
}

// Computes out = acc / l and lse of one row tile.
template <class T>
void finish(const BlockAttentionParams& p, const Rows& rows, const State& t) {
  const int64_t lanes = rows.lanes(), step = kLanes / rows.copies;
  const double unit = Logits(p).unit;
  for (int64_t done = 0, x = 0; done < rows.count; done += step, x += kLanes) {
    const Floats l = load(t.l + x), zero = splat(0.0f);
    const Mask blind = equal(l, zero);
    T* to[kLanes];
    const int64_t count = std::min(rows.count - done, step);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = (rows.b * p.Q + rows.query(done + r)) * p.H + rows.head(done + r);
      to[r] = static_cast<T*>(p.out) + row * p.D;
      const double sum = t.l[x + r * rows.copies], m = t.m[x + r * rows.copies];
      const double lse = (m == -kInfinity ? 0.0 : m * unit) + std::log(sum);
      p.lse[row] = sum == 0 ? -kInfinity : float(lse);
    }
    const auto column = [&](int64_t i, int64_t end) {
      const Floats acc = i < end ? load(t.acc + i * lanes + x) : zero;
      // + 0: makes an underflowed sum +0, whichever sign it had before tiles of zeros were added
      return bits(select(blind, zero, acc / l + zero));
    };
    for (int64_t d = 0; d < p.D; d += kLanes) {
      Words block[kLanes];
      if (rows.copies == 1) {
        for (int64_t i = 0; i < kLanes; ++i) block[i] = column(d + i, p.D);
        transpose(block);
      } else {
        for (int64_t i = 0; i < 4; ++i) block[i] = column(d / kCopies + i, p.D / kCopies);
        transpose_quarters(block);
      }
      for (int64_t r = 0; r < count; ++r) store_first(p.D - d, to[r] + d, from_bits(block[r]));
    }
  }
}

// The part of a work item that is shared by its row tiles.
template <class F>
class Item {
 public:
  using T = typename F::Element;

  Item(const BlockAttentionParams& p, const Plan<F>& plan, Scratch& t, int64_t item)
      : p_(p),
        plan_(plan),
        logits_(p),
        t_(t),
        item_(item),
        rows_(plan.rows_of(p, item)),
        ranges_(p, rows_.b),
        new_rows_(p, rows_.b) {
    tiles_ = (rows_.count + kTileRows - 1) / kTileRows;
    const int64_t cached = p.cache_row(rows_.b);
    k_ = static_cast<const T*>(p.k_cache) + cached * p.k_cache_stride[0] +
         rows_.g * p.k_cache_stride[2];
    v_ = static_cast<const T*>(p.v_cache) + cached * p.v_cache_stride[0] +
         rows_.g * p.v_cache_stride[2];
  }

  int64_t tiles() const { return tiles_; }
  Rows rows(int64_t tile) const { return plan_.rows_of(p_, item_, tile); }

  void load_queries() {
    first_ = p_.S, last_ = 0, limit_ = std::numeric_limits<int32_t>::min();
    for (int64_t r = 0; r < rows_.count; ++r) {
      const int64_t i = rows_.query(r);
      if (r > 0 && rows_.query(r - 1) == i) {
        t_.low[r] = t_.low[r - 1], t_.high[r] = t_.high[r - 1];
        continue;
      }
      interval(p_, rows_.b, i, &t_.low[r], &t_.high[r]);
      if (p_.q_limit) limit_ = std::max(limit_, p_.q_limit[rows_.b * p_.Q + i]);
      if (t_.low[r] < t_.high[r]) {
        first_ = std::min(first_, t_.low[r]);
        last_ = std::max(last_, t_.high[r]);
      }
    }
    int64_t attended_end;
    ranges_.hull(&grid_, &attended_end);
    last_ = std::min(last_, attended_end);

    const Words sign = splat(p_.scale < 0 ? F::kSign : 0u);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const Rows rows = this->rows(tile);
      const int64_t stride = rows.lanes();
      uint32_t* to = queries(tile);
      for (int64_t x = 0; x < stride; x += kLanes) {
        const T* from[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) {
          // Lanes beyond the last row repeat it, which is harmless and stays in bounds.
          const int64_t row = std::min((x + r) / rows.copies, rows.count - 1);
          from[r] = static_cast<const T*>(p_.q) + rows.b * p_.q_stride[0] +
                    rows.query(row) * p_.q_stride[1] + rows.head(row) * p_.q_stride[2];
        }
        for (int64_t u = 0; u < plan_.words; u += kLanes) {
          const int64_t n = std::min(plan_.words - u, kLanes);
          const int64_t there = p_.D / F::kElements - u;
          Words block[kLanes];
          for (int64_t r = 0; r < kLanes; ++r) {
            block[r] = F::words(from[r] + u * F::kElements, there) ^ sign;
          }
          transpose(block);
          for (int64_t i = 0; i < n; ++i) store(to + (u + i) * stride + x, block[i]);
        }
      }
    }
  }

  // Returns whether any row may see a slot of the span.
  bool begin_span(int64_t span) {
    span_first_ = grid_ + span * plan_.span;
    span_last_ = std::min(span_first_ + plan_.span, last_);
    packed_ = 0;
    return span_first_ < span_last_ && span_last_ > first_;
  }

  // Attention of one row tile over the slots of the span.
  void attend(int64_t tile, const State& state) {
    const Rows rows = this->rows(tile);
    if constexpr (!F::kTiles) {
      if (rows.copies == kCopies) return attend<1, kCopies>(rows, tile, state);
    }
    rows.lanes() == kLanes ? attend<1, 1>(rows, tile, state) : attend<2, 1>(rows, tile, state);
  }

 private:
  uint32_t* queries(int64_t tile) { return t_.q + tile * kTileRows * plan_.words; }

  // Converts a key tile up to the last slot that some row may see. The other slots, and slots
  // outside the ranges, become zeros and are not read.
  void pack_keys(int64_t tile, int64_t slot) {
    const int64_t words = plan_.words, there = p_.D / F::kElements, width = used(needed_);
    uint32_t* to = keys(tile);
    for (int64_t j = 0; j < width; ++j, to += words) {
      const T* row = row_of(k_, p_.k_cache_stride[1], slot, j);
      int64_t u = 0;
      for (; u + kLanes <= there; u += kLanes) store(to + u, F::words(row + u * F::kElements));
      if (u < there) store_first(words - u, to + u, F::words(row + u * F::kElements, there - u));
    }
  }
  // Like pack_keys, with the words of four slots side by side.
  void pack_keys_by_four(int64_t tile, int64_t slot) {
    const int64_t words = plan_.words, width = used(needed_);
    uint32_t* to = keys(tile);
    for (int64_t j = 0; j < width; j += 4) {
      const T* rows[4];
      for (int64_t i = 0; i < 4; ++i) rows[i] = row_of(k_, p_.k_cache_stride[1], slot, j + i);
      for (int64_t u = 0; u < words; u += kLanes) {
        const int64_t n = std::min(words - u, kLanes);
        Words block[4];
        for (int64_t i = 0; i < 4; ++i) block[i] = F::words(rows[i] + u * F::kElements, n);
        transpose_in_quarters(block);
        transpose_quarters(block);
        for (int64_t i = 0; i < n; i += 4, to += kLanes) store(to, block[i / 4]);
      }
    }
  }
  // Converts the values like pack_keys, replacing non-finite values by zeros: a row must not even
  // multiply by zero what it does not see.
  void pack_values(int64_t tile, int64_t slot) {
    constexpr int64_t kSlots = kSlotWords<F> * F::kElements;
    const int64_t width = used(needed_);
    uint32_t* to = values(tile);
    Words worst = splat(0u);
    for (int64_t j = 0; j < width; j += kSlots, to += plan_.D * kSlotWords<F>) {
      const T* rows[kSlots];
      for (int64_t i = 0; i < kSlots; ++i) {
        rows[i] = row_of(v_, p_.v_cache_stride[1], slot, j + i);
      }
      F::values(rows, p_.D, to, &worst);
    }
    finite_[tile] = F::finite(worst);
    if (finite_[tile]) return;
    for (uint32_t* x = values(tile); x < to; x += kLanes) store(x, F::or_zero(load(x)));
  }
  const T* row_of(const T* data, int64_t stride, int64_t slot, int64_t j) const {
    return needed_ >> j & 1 ? data + (slot + j) * stride : reinterpret_cast<const T*>(t_.zeros);
  }

  // With a single row tile, all key tiles are packed into the same place, which stays in the
  // first-level cache.
  uint32_t* keys(int64_t tile) { return t_.k + (tiles_ > 1 ? tile * kKeys * plan_.words : 0); }
  uint32_t* values(int64_t tile) { return t_.v + (tiles_ > 1 ? tile * kKeys * plan_.words : 0); }

  // Prefetch state for the rows of the key tile at `slot`.
  Ahead ahead(const T* data, int64_t stride, int64_t slot) const {
    if (slot >= last_) return {};
    constexpr int64_t kSize = sizeof(T);
    return {reinterpret_cast<const char*>(data + slot * stride), stride * kSize, p_.D * kSize,
            std::min(last_ - slot, kKeys)};
  }

  // Number of slots up to the last one needed, rounded up to whole vectors and blocks.
  static int64_t used(SlotMask needed) {
    constexpr int64_t kStep = std::max(kLanes, kBlock<F>);
    int64_t width = kKeys;
    while (width > 0 && !(needed >> (width - kStep))) width -= kStep;
    return width;
  }

  template <int kVectors, int kRepeat>
  void attend(const Rows& rows, int64_t row_tile, const State& state) {
    constexpr int64_t kStride = kVectors * kLanes;
    // With four lanes per row, weights need more room than logits, so they are placed behind them.
    uint32_t* weights =
        reinterpret_cast<uint32_t*>(t_.s) + (kRepeat == 1 ? 0 : kKeys / kRepeat * kLanes);
    const int64_t D = plan_.D, words = plan_.words;
    const int64_t *low = t_.low + row_tile * kTileRows, *high = t_.high + row_tile * kTileRows;
    const int64_t first = *std::min_element(low, low + rows.count);
    const int64_t all_from = *std::max_element(low, low + rows.count);
    const int64_t all_to = *std::min_element(high, high + rows.count);
    const int64_t last = *std::max_element(high, high + rows.count);
    state.clear(rows, D);

    for (int64_t slot = span_first_, tile = 0; slot < span_last_; slot += kKeys, ++tile) {
      if (slot >= last || slot + kKeys <= first) continue;
      const SlotMask attended = ranges_.tile(slot);
      const bool all_see_all = !~attended && slot >= all_from && slot + kKeys <= all_to &&
                               !p_.k_order && !new_rows_.touch(slot);
      const SlotMask needed = all_see_all ? attended : see(rows, slot, attended, low, high);
      if (!needed) continue;
      const int64_t width = used(needed);
      if (!all_see_all) {
        for (int x = 0; x < kVectors; ++x) see_lanes<kRepeat>(x, width);
      }
      const bool first_time = !(packed_ >> tile & 1);
      packed_ |= 1u << tile;
      Ahead next;
      const uint32_t* k = keys(tile);
      int64_t k_stride = words;
      if (first_time) {
        needed_ = ranges_.tile(slot) & bits_between(first_ - slot, last_ - slot);
        if (p_.k_order) needed_ &= in_order(p_, rows_.b, slot, limit_);
        const T* from = k_ + slot * p_.k_cache_stride[1];
        // Keys that are used only once are read in place, if all of them may be read. (Not for a
        // single vector of rows: sixteen keys at a time, at a power-of-two distance, would evict
        // one another.)
        if (kVectors == 2 && tiles_ == 1 && slot + width <= p_.S &&
            F::are_words(from, p_.k_cache_stride[1])) {
          k = reinterpret_cast<const uint32_t*>(from);
          k_stride = p_.k_cache_stride[1] / F::kElements;
        } else {
          kRepeat == 1 ? pack_keys(tile, slot) : pack_keys_by_four(tile, slot);
        }
        next = ahead(v_, p_.v_cache_stride[1], slot);
      }

      multiply_all<F, true, kVectors, kRepeat>(queries(row_tile), k, k_stride * kRepeat, kRepeat,
                                               words, nullptr, t_.s, width / kRepeat, &next);
      for (int x = 0; x < kVectors; ++x) {
        online_softmax<F, kRepeat>(logits_, t_.s + x * kLanes, weights + x * kLanes, kStride, width,
                                   all_see_all ? nullptr : t_.lanes[x], state.m + x * kLanes,
                                   state.l + x * kLanes, t_.shrink + x * kLanes);
      }
      if (first_time) {
        pack_values(tile, slot);
        next = ahead(k_, p_.k_cache_stride[1], slot + kKeys);
      }
      multiply_all<F, false, kVectors, kRepeat>(weights, values(tile), kRepeat * kSlotWords<F>, D,
                                                width / F::kElements, t_.shrink, state.acc,
                                                D / kRepeat, &next);
      if (!finite_[tile]) {
        add_not_finite<kVectors, kRepeat>(slot, needed, all_see_all, weights, state);
      }
    }
  }

  // Adds what pack_values left out, for the rows that see it: NaN and infinities, in any order.
  template <int kVectors, int kRepeat>
  void add_not_finite(int64_t slot, SlotMask needed, bool all_see_all, const uint32_t* weights,
                      const State& state) {
    constexpr int64_t kStride = kVectors * kLanes;
    if (kRepeat > 1 && !all_see_all) see_lanes_of_rows(used(needed));
    for (int64_t j = 0; j < kKeys; ++j) {
      if (!(needed >> j & 1)) continue;
      const T* value = v_ + (slot + j) * p_.v_cache_stride[1];
      int finite = 0;
      for (int64_t d = 0; d < p_.D; ++d) finite += std::isfinite(to_float(value[d]));
      if (finite == p_.D) continue;
      for (int64_t d = 0; d < p_.D; ++d) {
        const float y = to_float(value[d]);
        if (std::isfinite(y)) continue;
        const Mask of_d = to_mask(kRepeat == 1 ? 0xffffu : 0x1111u << d % kRepeat);
        for (int64_t x = 0; x < kVectors; ++x) {
          const Mask lanes = all_see_all ? of_d : of_d & t_.lanes[x][j];
          float* sum = state.acc + d / kRepeat * kStride + x * kLanes;
          const Floats weight = F::weight(weights + x * kLanes, kStride, j);
          store(sum, fma_where(lanes, weight, splat(y), load(sum)));
        }
      }
    }
  }

  // The lanes of vector x that see a slot; with four lanes per row, the four slots of its lanes.
  template <int kRepeat>
  void see_lanes(int64_t x, int64_t width) {
    if (kRepeat == 1) {
      for (int64_t j = 0; j < width; ++j) t_.lanes[x][j] = with_bit(t_.seen + x * kLanes, j);
      return;
    }
    for (int64_t j = 0; j < width; j += 4) {
      uint32_t lanes = 0;
      for (int64_t r = 0; r < 4; ++r) lanes |= uint32_t(t_.seen[r] >> j & 15) << (4 * r);
      t_.lanes[x][j / 4] = to_mask(lanes);
    }
  }
  // All four lanes of the rows that see a slot.
  void see_lanes_of_rows(int64_t width) {
    for (int64_t j = 0; j < width; ++j) {
      uint32_t lanes = 0;
      for (int64_t r = 0; r < 4; ++r) lanes |= (t_.seen[r] >> j & 1 ? 15u : 0u) << (4 * r);
      t_.lanes[0][j] = to_mask(lanes);
    }
  }

  // Computes which slots of a tile each row sees, and returns those that any row sees.
  SlotMask see(const Rows& rows, int64_t slot, SlotMask attended, const int64_t* low,
               const int64_t* high) {
    SlotMask needed = 0;
    std::fill_n(t_.seen, kTileRows, SlotMask(0));
    for (int64_t r = 0; r < rows.count && attended; ++r) {
      if (r > 0 && rows.query(r) == rows.query(r - 1)) {
        t_.seen[r] = t_.seen[r - 1];
        continue;
      }
      t_.seen[r] = attended & bits_between(low[r] - slot, high[r] - slot);
      if (p_.k_order && t_.seen[r]) {
        t_.seen[r] &= in_order(p_, rows.b, slot, p_.q_limit[rows.b * p_.Q + rows.query(r)]);
      }
      if (new_rows_.touch(slot)) t_.seen[r] &= ~new_rows_.hidden(rows.query(r), slot);
      needed |= t_.seen[r];
    }
    return needed;
  }

  const BlockAttentionParams& p_;
  const Plan<F>& plan_;
  const Logits logits_;
  Scratch& t_;
  const int64_t item_;
  const Rows rows_;
  const Ranges ranges_;
  const NewRows new_rows_;
  int64_t tiles_;
  const T *k_, *v_;
  int64_t first_, last_, grid_;  // slots that any row may see; where spans start
  int32_t limit_;
  int64_t span_first_, span_last_;
  uint32_t packed_;  // key tiles of the span, one bit each
  SlotMask needed_;  // slots of the last of them to convert
  bool finite_[kMaxTiles];
};

template <class F>
void attend(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  const Plan<F> plan(p);
  Scratch t;
  std::fill_n(t.zeros, kMaxHeadDim * 2, uint16_t(0));
  const int64_t D = plan.D;
  for (int64_t i = begin; i < end; ++i) {
    Item<F> item(p, plan, t, i / plan.splits);
    item.load_queries();
    if (plan.splits > 1) {
      float* partial = p.workspace + i * plan.tiles * State::floats(D);
      const bool any = item.begin_span(i % plan.splits);
      for (int64_t tile = 0; tile < item.tiles(); ++tile) {
        const State state(partial + tile * State::floats(D), D);
        any ? item.attend(tile, state) : state.clear(item.rows(tile), D);
      }
      continue;
    }
    bool started = false;
    for (int64_t span = 0; span < plan.spans; ++span) {
      if (!item.begin_span(span)) continue;
      for (int64_t tile = 0; tile < item.tiles(); ++tile) {
        const State sums(t.sums + tile * State::floats(D), D);
        if (!started) {
          item.attend(tile, sums);
        } else {
          const State more(t.more_sums, D);
          item.attend(tile, more);
          merge(Logits(p), sums, more, item.rows(tile), D);
        }
      }
      started = true;
    }
    for (int64_t tile = 0; tile < item.tiles(); ++tile) {
      const State sums(t.sums + tile * State::floats(D), D);
      if (!started) sums.clear(item.rows(tile), D);
      finish<typename F::Element>(p, item.rows(tile), sums);
    }
  }
}

// Merges the spans of a row tile of a work item that was split, in order.
template <class F>
void merge_spans(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  const Plan<F> plan(p);
  const int64_t D = plan.D, span_floats = plan.tiles * State::floats(D);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = i % plan.tiles;
    const Rows rows = plan.rows_of(p, i / plan.tiles, tile);
    if (rows.count <= 0) continue;
    float* at = p.workspace + i / plan.tiles * plan.splits * span_floats + tile * State::floats(D);
    const State sums(at, D);
    for (int64_t span = 1; span < plan.splits; ++span) {
      merge(Logits(p), sums, State(at + span * span_floats, D), rows, D);
    }
    finish<typename F::Element>(p, rows, sums);
  }
}

template <class F>
BlockAttentionWork work(const BlockAttentionParams& p) {
  const Plan<F> plan(p);
  const int64_t groups = p.B * p.G * plan.blocks;
  if (plan.splits == 1) return {groups, 0, 0};
  return {groups * plan.splits, groups * plan.tiles,
          groups * plan.splits * plan.tiles * State::floats(plan.D)};
}

template <class F>
constexpr BlockAttentionKernels kernels_of() {
  return {work<F>, attend<F>, merge_spans<F>, kGrain};
}

inline BlockAttentionKernels kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels_of<FloatWords<BFloat16>>();
    case DType::kFloat16:
      return kernels_of<FloatWords<Float16>>();
    default:
      return kernels_of<FloatWords<float>>();
  }
}

}  // namespace
}  // namespace dlm::cpu::DLM_NAMESPACE
