// SPDX-License-Identifier: Apache-2.0
// AVX-512 as value types: Floats and Words are sixteen floats and sixteen 32-bit words. Thin: one
// or two instructions a function, except the transposition and the exponential. Needs AVX-512 F,
// BW, DQ and VL; dot of bf16 pairs needs AVX512_BF16.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"

#define DLM_SIMD static inline __attribute__((always_inline))

namespace dlm::cpu::avx512 {

constexpr int64_t kLanes = 16;

struct Floats {
  __m512 v;
};
struct Words {
  __m512i v;
};
using LaneMask = __mmask16;

DLM_SIMD LaneMask first_lanes(int64_t n) {
  return n >= kLanes ? LaneMask(0xffff) : LaneMask((1u << n) - 1);
}

// --- floats
// ---------------------------------------------------------------------------------------
DLM_SIMD Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
DLM_SIMD Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
DLM_SIMD void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
DLM_SIMD Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
DLM_SIMD Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
DLM_SIMD Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
DLM_SIMD Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
DLM_SIMD Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; b if either is NaN.
DLM_SIMD Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
DLM_SIMD LaneMask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
DLM_SIMD LaneMask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
DLM_SIMD Floats select(LaneMask m, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}
DLM_SIMD Floats magnitude(Floats x) { return {_mm512_abs_ps(x.v)}; }
DLM_SIMD Floats with_sign_of(Floats sign, Floats x) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(x.v), 0xca))};
}

// 2^x for x <= 0 (and -inf, NaN) within 2 units in the last place, exact at 0; results below the
// smallest subnormal are 0. Polynomial on [-1/2, 1/2] with the least relative error.
DLM_SIMD Floats exp2_nonpositive(Floats x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-160.0f), x.v);  // a NaN stays
  const __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(clamped, n);
  __m512 p = _mm512_set1_ps(1.326472615e-03f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671512991e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733581e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402224243e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931470037e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(p, n)};
}

// tanh x: Cephes' polynomial (Moshier) around 0, from e^-2|x| elsewhere.
DLM_SIMD Floats tanh(Floats x) {
  const Floats z = x * x;
  Floats p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Floats near = fma(p * z, x, x);
  const Floats e = exp2_nonpositive(magnitude(x) * broadcast(-2.88539008f));  // -2 / ln 2
  const Floats one = broadcast(1.0f);
  const Floats far = with_sign_of(x, (one - e) / (one + e));
  return select(less(z, broadcast(0.390625f)), near, far);
}

// --- words
// ----------------------------------------------------------------------------------------
DLM_SIMD Words zero_words() { return {_mm512_setzero_si512()}; }
DLM_SIMD Words broadcast(uint32_t x) { return {_mm512_set1_epi32(int32_t(x))}; }
DLM_SIMD Words load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
DLM_SIMD void store(uint32_t* p, Words x) { _mm512_storeu_si512(p, x.v); }
DLM_SIMD Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
DLM_SIMD Words operator|(Words a, Words b) { return {_mm512_or_si512(a.v, b.v)}; }
DLM_SIMD Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
DLM_SIMD Words keep(LaneMask m, Words x) { return {_mm512_maskz_mov_epi32(m, x.v)}; }
DLM_SIMD Floats as_floats(Words x) { return {_mm512_castsi512_ps(x.v)}; }
DLM_SIMD Words as_words(Floats x) { return {_mm512_castps_si512(x.v)}; }

// Rows become columns: word j of row i goes to word i of row j.
DLM_SIMD void transpose(Words (&row)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(row[i].v, row[i + 1].v);
    a[i + 1] = _mm512_unpackhi_epi32(row[i].v, row[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 128-bit lanes: word 4 l + i of rows 0..3, 4..7, 8..11, 12..15
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    row[i].v = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    row[i + 8].v = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    row[i + 4].v = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    row[i + 12].v = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// In which of sixteen 64-bit words bit `index` is set.
DLM_SIMD LaneMask lanes_with_bit(const uint64_t* words, int64_t index) {
  const __m512i bit = _mm512_set1_epi64(int64_t(uint64_t(1) << index));
  const __mmask8 low = _mm512_test_epi64_mask(_mm512_loadu_si512(words), bit);
  const __mmask8 high = _mm512_test_epi64_mask(_mm512_loadu_si512(words + 8), bit);
  return LaneMask(low | high << 8);
}

// --- element types: `n` of them read (the others are 0) or written
// ----------------------------------
DLM_SIMD Words load_words(const void* p, int64_t n) {
  return {_mm512_maskz_loadu_epi32(first_lanes(n), p)};
}
DLM_SIMD void store(uint32_t* p, Words x, int64_t n) {
  _mm512_mask_storeu_epi32(p, first_lanes(n), x.v);
}
DLM_SIMD Floats load(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
DLM_SIMD Floats load(const BFloat16* p, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
DLM_SIMD Floats load(const Float16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
DLM_SIMD void store(float* p, Floats x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}
DLM_SIMD void store(BFloat16* p, Floats x, int64_t n) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded =  // to nearest even; a NaN stays one
      _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_mask_storeu_epi16(p, first_lanes(n), half);
}
DLM_SIMD void store(Float16* p, Floats x, int64_t n) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, first_lanes(n), half);
}

// --- bf16 pairs: the lower half of a word comes first
// ----------------------------------------------- 32 elements of each of two rows, as pairs (a[i],
// b[i]).
DLM_SIMD void interleave(Words a, Words b, Words* low, Words* high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low->v = _mm512_permutex2var_epi16(a.v, first, b.v);
  high->v = _mm512_permutex2var_epi16(a.v, second, b.v);
}
// The larger of the magnitudes' bits, element by element; seen to hold infinity or NaN.
DLM_SIMD Words max_magnitude16(Words a, Words x) {
  const __m512i bits = _mm512_and_si512(x.v, _mm512_set1_epi16(0x7fff));
  return {_mm512_max_epu16(a.v, bits)};
}
DLM_SIMD Words max_magnitude32(Words a, Words x) {
  const __m512i bits = _mm512_and_si512(x.v, _mm512_set1_epi32(0x7fffffff));
  return {_mm512_max_epu32(a.v, bits)};
}
DLM_SIMD bool all_finite16(Words magnitude) {
  return !_mm512_cmpge_epu16_mask(magnitude.v, _mm512_set1_epi16(0x7f80));
}
DLM_SIMD bool all_finite32(Words magnitude) {
  return !_mm512_cmpge_epu32_mask(magnitude.v, _mm512_set1_epi32(0x7f800000));
}
#ifdef __AVX512BF16__
DLM_SIMD Words pairs(Floats first, Floats second) {
  const __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, narrow)};
}
// sum + a.first * b.first + a.second * b.second
DLM_SIMD Floats dot_pairs(Words a, Words b, Floats sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

}  // namespace dlm::cpu::avx512
