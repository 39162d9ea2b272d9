// SPDX-License-Identifier: Apache-2.0
// The vectors of *_avx512.cpp: 512 bits as GNU vector types (their + - * & ^ << work on every
// element), and by name what has no operator. Needs AVX-512F, BW, DQ and VL.
//
// Everything is always inlined, here as in csrc/common: a copy made with these instructions could
// be the one the linker keeps for files that must run without them.
#pragma once
#include <immintrin.h>

#include "common/dtype.h"

namespace dlm::cpu::avx512 {

using Floats = __m512;
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
using Mask = __mmask16;

constexpr int kWidth = 16;

#define DLM_SIMD inline __attribute__((always_inline))

DLM_SIMD Floats splat(float x) { return _mm512_set1_ps(x); }
DLM_SIMD Words splat(uint32_t x) { return (Words)_mm512_set1_epi32(int(x)); }
DLM_SIMD Longs splat(uint64_t x) { return (Longs)_mm512_set1_epi64(int64_t(x)); }

// --- memory ------------------------------------------------------------------------------------

DLM_SIMD Floats load(const float* x) { return _mm512_loadu_ps(x); }
DLM_SIMD Words load(const uint32_t* x) { return (Words)_mm512_loadu_si512(x); }
DLM_SIMD Longs load(const uint64_t* x) { return (Longs)_mm512_loadu_si512(x); }
DLM_SIMD Floats from_bfloat16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
DLM_SIMD Floats load(const BFloat16* x) {
  return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
DLM_SIMD Floats load(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// The elements that `mask` names, 0 elsewhere; no other memory is touched.
DLM_SIMD Floats load(Mask mask, const float* x) { return _mm512_maskz_loadu_ps(mask, x); }
DLM_SIMD Floats load(Mask mask, const BFloat16* x) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(mask, x));
}
DLM_SIMD Floats load(Mask mask, const Float16* x) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

DLM_SIMD void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
DLM_SIMD void store(uint32_t* to, Words x) { _mm512_storeu_si512(to, (__m512i)x); }
DLM_SIMD void store(uint64_t* to, Longs x) { _mm512_storeu_si512(to, (__m512i)x); }

// --- arithmetic --------------------------------------------------------------------------------

DLM_SIMD Words bits(Floats x) { return (Words)x; }
DLM_SIMD Floats from_bits(Words x) { return (Floats)x; }
DLM_SIMD Floats to_floats(Words x) { return _mm512_cvtepi32_ps((__m512i)x); }  // as signed integers
DLM_SIMD Words to_words(Floats x) { return (Words)_mm512_cvttps_epu32(x); }

// a * b + c and a * b - c, rounded once. (Products and sums written as such round separately.)
DLM_SIMD Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
DLM_SIMD Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
DLM_SIMD Floats fma_where(Mask mask, Floats a, Floats b, Floats c) {  // c elsewhere
  return _mm512_mask3_fmadd_ps(a, b, c, mask);
}
DLM_SIMD Floats fma_or_zero(Mask mask, Floats a, Floats b, Floats c) {
  return _mm512_maskz_fmadd_ps(mask, a, b, c);
}

DLM_SIMD Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
DLM_SIMD Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
DLM_SIMD Words min(Words a, Words b) { return (Words)_mm512_min_epu32((__m512i)a, (__m512i)b); }
DLM_SIMD Floats magnitude(Floats x) { return _mm512_abs_ps(x); }

// The low halves' 64-bit products.
DLM_SIMD Longs multiply_low(Longs a, Longs b) {
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
DLM_SIMD Longs exclusive_or(Longs a, Longs b, Longs c) {
  return (Longs)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}

// --- masks -------------------------------------------------------------------------------------

DLM_SIMD Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
DLM_SIMD Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
DLM_SIMD Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
DLM_SIMD Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// These hold where one is NaN.
DLM_SIMD Mask not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
DLM_SIMD Mask not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
DLM_SIMD Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
DLM_SIMD Mask at_most(Words a, Words b) {
  return _mm512_cmple_epu32_mask((__m512i)a, (__m512i)b);
}
DLM_SIMD Mask at_most(Mask of, Words a, Words b) {
  return _mm512_mask_cmple_epu32_mask(of, (__m512i)a, (__m512i)b);
}

DLM_SIMD Floats select(Mask mask, Floats where, Floats elsewhere) {
  return _mm512_mask_mov_ps(elsewhere, mask, where);
}
DLM_SIMD Words select(Mask mask, Words where, Words elsewhere) {
  return (Words)_mm512_mask_mov_epi32((__m512i)elsewhere, mask, (__m512i)where);
}

// --- across elements ---------------------------------------------------------------------------

// table[index % 16]
DLM_SIMD Floats look_up(Words index, Floats table) {
  return _mm512_permutexvar_ps((__m512i)index, table);
}
DLM_SIMD Words look_up(Words index, Words table) {
  return (Words)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
}
DLM_SIMD float largest(Floats x) { return _mm512_reduce_max_ps(x); }
DLM_SIMD float sum(Floats x) { return _mm512_reduce_add_ps(x); }  // pairwise
DLM_SIMD uint64_t sum(Longs x) { return uint64_t(_mm512_reduce_add_epi64((__m512i)x)); }
// The elements that `mask` names, moved together.
DLM_SIMD Words compress(Mask mask, Words x) {
  return (Words)_mm512_maskz_compress_epi32(mask, (__m512i)x);
}
DLM_SIMD Longs compress(__mmask8 mask, Longs x) {
  return (Longs)_mm512_maskz_compress_epi64(mask, (__m512i)x);
}
// Elements 2 l of a and b, and elements 2 l + 1, side by side.
DLM_SIMD Longs pair_even(Longs a, Longs b) {
  return (Longs)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
}
DLM_SIMD Longs pair_odd(Longs a, Longs b) {
  return (Longs)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
}
// Non-negative floats below 2^63 without their fractions: the first eight, the last eight.
DLM_SIMD Longs first_to_longs(Floats x) {
  return (Longs)_mm512_cvttps_epi64(_mm512_castps512_ps256(x));
}
DLM_SIMD Longs last_to_longs(Floats x) {
  return (Longs)_mm512_cvttps_epi64(_mm512_extractf32x8_ps(x, 1));
}

}  // namespace dlm::cpu::avx512
