// SPDX-License-Identifier: Apache-2.0
// The vectors for *_avx512.cpp: 512 bits as GNU vector types (whose + - * & ^ << work on every
// element), and named functions for everything without an operator. Needs AVX-512F, BW, DQ and VL.
//
// Everything is always inlined, as in csrc/common: the linker could otherwise keep a copy compiled
// with these instructions for files that must run without them.
#pragma once
#include <immintrin.h>

#include "common/dtype.h"

namespace dlm::cpu::avx512 {

using Floats = __m512;
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
using Mask = __mmask16;

constexpr int kWidth = 16;
constexpr bool kManyRegisters = true;  // 32, each a whole vector

#define DLM_SIMD inline __attribute__((always_inline))

DLM_SIMD Floats splat(float x) { return _mm512_set1_ps(x); }
DLM_SIMD Words splat(uint32_t x) { return (Words)_mm512_set1_epi32(int(x)); }
DLM_SIMD Longs splat(uint64_t x) { return (Longs)_mm512_set1_epi64(int64_t(x)); }

// --- memory ------------------------------------------------------------------------------------

DLM_SIMD Floats load(const float* x) { return _mm512_loadu_ps(x); }
DLM_SIMD Words load(const uint32_t* x) { return (Words)_mm512_loadu_si512(x); }
DLM_SIMD Floats from_bfloat16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
DLM_SIMD Floats load(const BFloat16* x) {
  return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
DLM_SIMD Floats load(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// The elements selected by `mask`, and 0 elsewhere; no other memory is accessed.
DLM_SIMD Floats load(Mask mask, const float* x) { return _mm512_maskz_loadu_ps(mask, x); }
DLM_SIMD Floats load(Mask mask, const BFloat16* x) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(mask, x));
}
DLM_SIMD Floats load(Mask mask, const Float16* x) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

DLM_SIMD void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
DLM_SIMD void store(uint32_t* to, Words x) { _mm512_storeu_si512(to, (__m512i)x); }

// sums[i] += x[i], for 16 elements.
DLM_SIMD void add_to(double* sums, Floats x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_loadu_pd(sums) + low);
  _mm512_storeu_pd(sums + 8, _mm512_loadu_pd(sums + 8) + high);
}

// --- arithmetic --------------------------------------------------------------------------------

DLM_SIMD Words bits(Floats x) { return (Words)x; }
DLM_SIMD Floats from_bits(Words x) { return (Floats)x; }

// a * b + c and a * b - c, rounded once. (Separately written products and sums round separately.)
DLM_SIMD Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
DLM_SIMD Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
DLM_SIMD Floats fma_where(Mask mask, Floats a, Floats b, Floats c) {  // c elsewhere
  return _mm512_mask3_fmadd_ps(a, b, c, mask);
}

DLM_SIMD Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if one is NaN
DLM_SIMD Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
DLM_SIMD Floats magnitude(Floats x) { return _mm512_abs_ps(x); }

// --- masks -------------------------------------------------------------------------------------

DLM_SIMD Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
DLM_SIMD Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
DLM_SIMD Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
DLM_SIMD Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
DLM_SIMD Mask at_most(Words a, Words b) { return _mm512_cmple_epu32_mask((__m512i)a, (__m512i)b); }

DLM_SIMD Floats select(Mask mask, Floats where, Floats elsewhere) {
  return _mm512_mask_mov_ps(elsewhere, mask, where);
}
DLM_SIMD Words select(Mask mask, Words where, Words elsewhere) {
  return (Words)_mm512_mask_mov_epi32((__m512i)elsewhere, mask, (__m512i)where);
}

// --- across elements ---------------------------------------------------------------------------

DLM_SIMD float largest(Floats x) { return _mm512_reduce_max_ps(x); }
DLM_SIMD float sum(Floats x) { return _mm512_reduce_add_ps(x); }  // pairwise
// Stores the elements selected by `mask` contiguously, to memory with room for sixteen; returns
// their number.
DLM_SIMD int append(float* to, Mask mask, Floats x) {
  store(to, _mm512_maskz_compress_ps(mask, x));
  return __builtin_popcount(mask);
}

// A sum of non-negative floats, each rounded to an integer (nearest even).
class Wholes {
 public:
  DLM_SIMD void add(Floats x) {
    low_ = low_ + (Longs)_mm512_cvtps_epi64(_mm512_castps512_ps256(x));
    high_ = high_ + (Longs)_mm512_cvtps_epi64(_mm512_extractf32x8_ps(x, 1));
  }
  DLM_SIMD uint64_t sum() const {
    return uint64_t(_mm512_reduce_add_epi64((__m512i)(low_ + high_)));
  }

 private:
  Longs low_ = splat(uint64_t(0)), high_ = splat(uint64_t(0));
};

// --- parts of a vector, rows and columns ---------------------------------------------------------

DLM_SIMD Mask first(int64_t n) { return n >= kWidth ? Mask(0xffff) : Mask((1u << n) - 1); }

DLM_SIMD Words load(Mask mask, const uint32_t* x) {
  return (Words)_mm512_maskz_loadu_epi32(mask, x);
}
DLM_SIMD void store(Mask mask, uint32_t* to, Words x) {
  _mm512_mask_storeu_epi32(to, mask, (__m512i)x);
}
DLM_SIMD void store(Mask mask, float* to, Floats x) { _mm512_mask_storeu_ps(to, mask, x); }
DLM_SIMD void store(Mask mask, BFloat16* to, Floats x) {  // to nearest even; NaN stays NaN
  const Words b = bits(x), rounded = b + 0x7fff + (b >> 16 & 1);
  const Words half = select(is_nan(x), b | 0x400000, rounded) >> 16;
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16((__m512i)half));
}
DLM_SIMD void store(Mask mask, Float16* to, Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, kNearest));
}

// Functions that simd_avx2.h has by the same names: the first n elements (0 elsewhere; no other
// memory is accessed), and masks as one bit per element.
template <class T>
DLM_SIMD auto load_first(int64_t n, const T* x) {
  return load(first(n), x);
}
template <class T, class V>
DLM_SIMD void store_first(int64_t n, T* to, V x) {
  store(first(n), to, x);
}
DLM_SIMD uint32_t to_bits(Mask x) { return x; }
DLM_SIMD Mask to_mask(uint32_t x) { return Mask(x); }

// Returns which of sixteen 64-bit words have bit `index` set.
DLM_SIMD Mask with_bit(const uint64_t* words, int64_t index) {
  const __m512i bit = _mm512_set1_epi64(int64_t(uint64_t(1) << index));
  const __mmask8 low = _mm512_test_epi64_mask(_mm512_loadu_si512(words), bit);
  const __mmask8 high = _mm512_test_epi64_mask(_mm512_loadu_si512(words + 8), bit);
  return Mask(low | high << 8);
}

// Quarters: the four parts of four words each.
DLM_SIMD Words splat_four(const uint32_t* x) {  // to every quarter
  return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
// Broadcasts within each quarter: one of its words, the largest (b of max if one is NaN), or the
// sum (x0 + x1) + (x2 + x3).
template <int kIndex>
DLM_SIMD Floats one_of_four(Floats x) {
  return _mm512_permute_ps(x, kIndex * 0x55);
}
DLM_SIMD Floats max_of_four(Floats x) {
  x = max(x, _mm512_permute_ps(x, 0xb1));
  return max(x, _mm512_permute_ps(x, 0x4e));
}
DLM_SIMD Floats sum_of_four(Floats x) {
  x = x + _mm512_permute_ps(x, 0xb1);
  return x + _mm512_permute_ps(x, 0x4e);
}
// Moves quarter j of row i to quarter i of row j.
DLM_SIMD void transpose_quarters(Words* row) {
  const __m512i r0 = (__m512i)row[0], r1 = (__m512i)row[1], r2 = (__m512i)row[2],
                r3 = (__m512i)row[3];
  const __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x88), b = _mm512_shuffle_i32x4(r2, r3, 0x88);
  const __m512i c = _mm512_shuffle_i32x4(r0, r1, 0xdd), d = _mm512_shuffle_i32x4(r2, r3, 0xdd);
  row[0] = (Words)_mm512_shuffle_i32x4(a, b, 0x88);
  row[1] = (Words)_mm512_shuffle_i32x4(c, d, 0x88);
  row[2] = (Words)_mm512_shuffle_i32x4(a, b, 0xdd);
  row[3] = (Words)_mm512_shuffle_i32x4(c, d, 0xdd);
}
// Within each quarter, moves word j of row i to word i of row j.
DLM_SIMD void transpose_in_quarters(Words* row) {
  const __m512i r0 = (__m512i)row[0], r1 = (__m512i)row[1], r2 = (__m512i)row[2],
                r3 = (__m512i)row[3];
  const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpacklo_epi32(r2, r3);
  const __m512i c = _mm512_unpackhi_epi32(r0, r1), d = _mm512_unpackhi_epi32(r2, r3);
  row[0] = (Words)_mm512_unpacklo_epi64(a, b);
  row[1] = (Words)_mm512_unpackhi_epi64(a, b);
  row[2] = (Words)_mm512_unpacklo_epi64(c, d);
  row[3] = (Words)_mm512_unpackhi_epi64(c, d);
}

// Transposes: word j of row i becomes word i of row j.
DLM_SIMD void transpose(Words (&row)[16]) {
  Words column[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    transpose_in_quarters(row + 4 * i);  // quarter q of row 4 i + j: rows 4 i ... of column 4 q + j
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Words quarters[4] = {row[j], row[4 + j], row[8 + j], row[12 + j]};
    transpose_quarters(quarters);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) column[4 * q + j] = quarters[q];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = column[i];
}

// --- elementary functions that may use fused multiply-add ----------------------------------------

// 2^x for x <= 0 (and -inf, NaN) within 2 units in the last place, exact at 0; results below the
// smallest subnormal are 0. The polynomial minimizes the relative error on [-1/2, 1/2].
DLM_SIMD Floats exp2_nonpositive(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Floats clamped = max(splat(-160.0f), x);  // NaN stays NaN
  const Floats n = _mm512_roundscale_ps(clamped, kNearest), f = clamped - n;
  Floats p = splat(1.326472615e-03f);
  p = fma(p, f, splat(9.671512991e-03f));
  p = fma(p, f, splat(5.550733581e-02f));
  p = fma(p, f, splat(2.402224243e-01f));
  p = fma(p, f, splat(6.931470037e-01f));
  p = fma(p, f, splat(1.0f));
  return _mm512_scalef_ps(p, n);
}

// tanh x: Cephes' polynomial (Moshier) near 0, computed from e^-2|x| elsewhere.
DLM_SIMD Floats tanh(Floats x) {
  const Floats z = x * x, one = splat(1.0f);
  Floats p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Floats near = fma(p * z, x, x);
  const Floats e = exp2_nonpositive(magnitude(x) * splat(-2.88539008f));  // -2 / ln 2
  const Words sign = bits(x) & 0x80000000u;
  const Floats far = from_bits(bits((one - e) / (one + e)) | sign);
  return select(less(z, splat(0.390625f)), near, far);
}

// --- pairs of bf16: the lower half of a word is the first
// -----------------------------------------

// Interleaves the 16-bit halves of two rows: a[0] b[0] a[1] b[1] ... in two vectors.
DLM_SIMD void interleave(Words a, Words b, Words* low, Words* high) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i next = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  *low = (Words)_mm512_permutex2var_epi16((__m512i)a, order, (__m512i)b);
  *high = (Words)_mm512_permutex2var_epi16((__m512i)a, next, (__m512i)b);
}
// The larger of the two half-words, in both halves.
DLM_SIMD Words max_halves(Words a, Words b) {
  return (Words)_mm512_max_epu16((__m512i)a, (__m512i)b);
}
DLM_SIMD Words max(Words a, Words b) { return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#ifdef __AVX512BF16__
DLM_SIMD Words pairs(Floats first, Floats second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
// Broadcasts within each quarter: the pair of its first two words, and that of its last two.
DLM_SIMD void pairs_of_four(Floats x, Words* first, Words* second) {
  const __m512i narrow = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(x));
  const __m512i order = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
  *first = (Words)_mm512_permutexvar_epi32(order, narrow);
  *second = (Words)_mm512_permutexvar_epi32(_mm512_add_epi32(order, _mm512_set1_epi32(1)), narrow);
}
// sum + a.first * b.first + a.second * b.second
DLM_SIMD Floats dot_pairs(Words a, Words b, Floats sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

}  // namespace dlm::cpu::avx512
