// SPDX-License-Identifier: Apache-2.0
// The vectors for *_avx2.cpp: sixteen elements in two 256-bit registers, with the same names as in
// simd_avx512.h, so that kernels compile with either. Needs AVX2, FMA, F16C.
//
// Everything is always inlined: see simd_avx512.h.
#pragma once
#include <immintrin.h>

#include "common/dtype.h"

namespace dlm::cpu::avx2 {

#define DLM_SIMD inline __attribute__((always_inline))

struct Floats {
  __m256 low, high;
};
struct Words {
  __m256i low, high;
};
struct Mask {  // all bits of an element set, or none
  __m256i low, high;
};

constexpr int kWidth = 16;
constexpr bool kManyRegisters = false;  // 16, each half a vector

DLM_SIMD Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DLM_SIMD Words splat(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
DLM_SIMD Words bits(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
DLM_SIMD Floats from_bits(Words x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}

// --- operators -----------------------------------------------------------------------------------

DLM_SIMD Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
DLM_SIMD Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
DLM_SIMD Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
DLM_SIMD Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
DLM_SIMD Words operator+(Words a, Words b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
DLM_SIMD Words operator&(Words a, Words b) { return {a.low & b.low, a.high & b.high}; }
DLM_SIMD Words operator|(Words a, Words b) { return {a.low | b.low, a.high | b.high}; }
DLM_SIMD Words operator^(Words a, Words b) { return {a.low ^ b.low, a.high ^ b.high}; }
DLM_SIMD Words operator+(Words a, uint32_t b) { return a + splat(b); }
DLM_SIMD Words operator&(Words a, uint32_t b) { return a & splat(b); }
DLM_SIMD Words operator|(Words a, uint32_t b) { return a | splat(b); }
DLM_SIMD Words operator>>(Words a, int n) {
  return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)};
}
DLM_SIMD Words operator<<(Words a, int n) {
  return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)};
}
DLM_SIMD Mask operator&(Mask a, Mask b) { return {a.low & b.low, a.high & b.high}; }

// --- memory --------------------------------------------------------------------------------------

DLM_SIMD __m256 load_eight(const float* x) { return _mm256_loadu_ps(x); }
DLM_SIMD __m256 load_eight(const BFloat16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
DLM_SIMD __m256 load_eight(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
template <class T>
DLM_SIMD Floats load(const T* x) {
  return {load_eight(x), load_eight(x + 8)};
}
DLM_SIMD Words load(const uint32_t* x) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8))};
}
DLM_SIMD void store(uint32_t* to, Words x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), x.high);
}
DLM_SIMD void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}

DLM_SIMD Mask is_nan(Floats x) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q)),
          _mm256_castps_si256(_mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q))};
}
DLM_SIMD Words select(Mask mask, Words where, Words elsewhere) {
  return {_mm256_blendv_epi8(elsewhere.low, where.low, mask.low),
          _mm256_blendv_epi8(elsewhere.high, where.high, mask.high)};
}
DLM_SIMD Floats select(Mask mask, Floats where, Floats elsewhere) {
  return from_bits(select(mask, bits(where), bits(elsewhere)));
}

DLM_SIMD void store(BFloat16* to, Floats x) {  // to nearest even; NaN stays NaN
  const Words b = bits(x), rounded = b + (splat(0x7fffu) + (b >> 16 & 1));
  const Words half = select(is_nan(x), b | 0x400000, rounded) >> 16;
  const __m256i mixed = _mm256_packus_epi32(half.low, half.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
}
DLM_SIMD void store(Float16* to, Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.low, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(x.high, kNearest));
}

// The first n elements, and 0 elsewhere; no other memory is accessed.
template <class T>
DLM_SIMD Floats load_first(int64_t n, const T* x) {
  if (n >= kWidth) return load(x);
  if (n == kWidth / 2) return {load_eight(x), _mm256_setzero_ps()};
  T padded[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  return load(padded);
}
template <class T>
DLM_SIMD void store_first(int64_t n, T* to, Floats x) {
  if (n >= kWidth) return store(to, x);
  T padded[kWidth];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) to[i] = padded[i];
}
DLM_SIMD void store_first(int64_t n, uint32_t* to, Words x) {
  if (n >= kWidth) return store(to, x);
  uint32_t padded[kWidth];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) to[i] = padded[i];
}

// sums[i] += x[i], for 16 elements.
DLM_SIMD void add_to(double* sums, Floats x) {
  const __m128 parts[] = {_mm256_castps256_ps128(x.low), _mm256_extractf128_ps(x.low, 1),
                          _mm256_castps256_ps128(x.high), _mm256_extractf128_ps(x.high, 1)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    double* to = sums + 4 * i;
    _mm256_storeu_pd(to, _mm256_loadu_pd(to) + _mm256_cvtps_pd(parts[i]));
  }
}

// --- arithmetic ----------------------------------------------------------------------------------

// a * b + c, rounded once. (Separately written products and sums round separately.)
DLM_SIMD Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
DLM_SIMD Floats fms(Floats a, Floats b, Floats c) {  // a * b - c
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
DLM_SIMD Floats fma_where(Mask mask, Floats a, Floats b, Floats c) {  // c elsewhere
  return select(mask, fma(a, b, c), c);
}
DLM_SIMD Floats max(Floats a, Floats b) {  // b if one is NaN
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
DLM_SIMD Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
DLM_SIMD Words max(Words a, Words b) {
  return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)};
}
DLM_SIMD Floats magnitude(Floats x) { return from_bits(bits(x) & 0x7fffffffu); }

// --- masks ---------------------------------------------------------------------------------------

template <int kHow>
DLM_SIMD Mask compare(Floats a, Floats b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, kHow)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, kHow))};
}
DLM_SIMD Mask equal(Floats a, Floats b) { return compare<_CMP_EQ_OQ>(a, b); }
DLM_SIMD Mask less(Floats a, Floats b) { return compare<_CMP_LT_OQ>(a, b); }
DLM_SIMD Mask at_least(Floats a, Floats b) { return compare<_CMP_GE_OQ>(a, b); }
DLM_SIMD Mask at_most(Words a, Words b) {
  return {_mm256_cmpeq_epi32(_mm256_max_epu32(a.low, b.low), b.low),
          _mm256_cmpeq_epi32(_mm256_max_epu32(a.high, b.high), b.high)};
}
// Converts masks to one bit per element, and back.
DLM_SIMD uint32_t to_bits(Mask x) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x.low))) |
         uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x.high))) << 8;
}
DLM_SIMD Mask to_mask(uint32_t x) {
  const __m256i all = _mm256_set1_epi32(int(x));
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_cmpeq_epi32(all & low, low), _mm256_cmpeq_epi32(all & high, high)};
}
// Stores the elements selected by `mask` contiguously, to memory with room for sixteen; returns
// their number.
DLM_SIMD int append(float* to, Mask mask, Floats x) {
  float all[kWidth];
  store(all, x);
  int count = 0;
  for (uint32_t left = to_bits(mask); left; left &= left - 1)
    to[count++] = all[__builtin_ctz(left)];
  return count;
}
DLM_SIMD Mask first(int64_t n) { return to_mask(n >= kWidth ? 0xffffu : (1u << n) - 1); }

// Joins pairs of elements that are 8 apart first, then 4, and so on.
template <class Join>
DLM_SIMD float across(Floats x, Join join) {
  const __m256 eight = join(x.low, x.high);
  __m256 four = join(eight, _mm256_permute2f128_ps(eight, eight, 1));
  four = join(four, _mm256_permute_ps(four, 0x4e));
  return _mm256_cvtss_f32(join(four, _mm256_permute_ps(four, 0xb1)));
}
DLM_SIMD float largest(Floats x) {
  return across(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}
DLM_SIMD float sum(Floats x) {
  return across(x, [](__m256 a, __m256 b) { return a + b; });
}

// A sum of non-negative floats below 2^51, each rounded to an integer (nearest even): adding 1.5 *
// 2^52 leaves it in the lowest bits of a double.
class Wholes {
 public:
  DLM_SIMD void add(Floats x) {
    add(_mm256_castps256_ps128(x.low), 0);
    add(_mm256_extractf128_ps(x.low, 1), 1);
    add(_mm256_castps256_ps128(x.high), 2);
    add(_mm256_extractf128_ps(x.high, 1), 3);
  }
  DLM_SIMD uint64_t sum() const {
    alignas(32) uint64_t each[4];
    const __m256i all = _mm256_add_epi64(_mm256_add_epi64(four_[0], four_[1]),
                                         _mm256_add_epi64(four_[2], four_[3]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), all);
    return (each[0] + each[1]) + (each[2] + each[3]);
  }

 private:
  DLM_SIMD void add(__m128 x, int i) {
    const __m256d magic = _mm256_set1_pd(6755399441055744.0), shifted = _mm256_cvtps_pd(x) + magic;
    const __m256i whole =
        _mm256_sub_epi64(_mm256_castpd_si256(shifted), _mm256_castpd_si256(magic));
    four_[i] = _mm256_add_epi64(four_[i], whole);
  }
  __m256i four_[4] = {};
};

// Returns which of sixteen 64-bit words have bit `index` set.
DLM_SIMD Mask with_bit(const uint64_t* words, int64_t index) {
  const __m256i bit = _mm256_set1_epi64x(int64_t(uint64_t(1) << index));
  __m256 found[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 4 * i));
    found[i] = _mm256_castsi256_ps(_mm256_cmpeq_epi64(four & bit, bit));
  }
  const __m256 low = _mm256_shuffle_ps(found[0], found[1], 0x88);
  const __m256 high = _mm256_shuffle_ps(found[2], found[3], 0x88);
  return {_mm256_permute4x64_epi64(_mm256_castps_si256(low), 0xd8),
          _mm256_permute4x64_epi64(_mm256_castps_si256(high), 0xd8)};
}

// --- quarters: the four parts of four words ------------------------------------------------------

DLM_SIMD Words splat_four(const uint32_t* x) {  // to every quarter
  const __m256i four =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return {four, four};
}
template <int kOrder>
DLM_SIMD Floats in_quarters(Floats x) {
  return {_mm256_permute_ps(x.low, kOrder), _mm256_permute_ps(x.high, kOrder)};
}
// Broadcasts within each quarter: one of its words, the largest (b of max if one is NaN), or the
// sum (x0 + x1) + (x2 + x3).
template <int kIndex>
DLM_SIMD Floats one_of_four(Floats x) {
  return in_quarters<kIndex * 0x55>(x);
}
DLM_SIMD Floats max_of_four(Floats x) {
  x = max(x, in_quarters<0xb1>(x));
  return max(x, in_quarters<0x4e>(x));
}
DLM_SIMD Floats sum_of_four(Floats x) {
  x = x + in_quarters<0xb1>(x);
  return x + in_quarters<0x4e>(x);
}
// Moves quarter j of row i to quarter i of row j.
DLM_SIMD void transpose_quarters(Words* row) {
  const Words r0 = row[0], r1 = row[1], r2 = row[2], r3 = row[3];
  row[0] = {_mm256_permute2x128_si256(r0.low, r1.low, 0x20),
            _mm256_permute2x128_si256(r2.low, r3.low, 0x20)};
  row[1] = {_mm256_permute2x128_si256(r0.low, r1.low, 0x31),
            _mm256_permute2x128_si256(r2.low, r3.low, 0x31)};
  row[2] = {_mm256_permute2x128_si256(r0.high, r1.high, 0x20),
            _mm256_permute2x128_si256(r2.high, r3.high, 0x20)};
  row[3] = {_mm256_permute2x128_si256(r0.high, r1.high, 0x31),
            _mm256_permute2x128_si256(r2.high, r3.high, 0x31)};
}
// Within each quarter, moves word j of row i to word i of row j.
DLM_SIMD void transpose_halves(__m256i& r0, __m256i& r1, __m256i& r2, __m256i& r3) {
  const __m256i a = _mm256_unpacklo_epi32(r0, r1), b = _mm256_unpacklo_epi32(r2, r3);
  const __m256i c = _mm256_unpackhi_epi32(r0, r1), d = _mm256_unpackhi_epi32(r2, r3);
  r0 = _mm256_unpacklo_epi64(a, b), r1 = _mm256_unpackhi_epi64(a, b);
  r2 = _mm256_unpacklo_epi64(c, d), r3 = _mm256_unpackhi_epi64(c, d);
}
DLM_SIMD void transpose_in_quarters(Words* row) {
  transpose_halves(row[0].low, row[1].low, row[2].low, row[3].low);
  transpose_halves(row[0].high, row[1].high, row[2].high, row[3].high);
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

// As in simd_avx512.h: within 2 units in the last place, exact at 0; the same polynomial. Results
// below 2^-125 are 0, so the integer part can simply be added to the exponent.
DLM_SIMD __m256 exp2_nonpositive(__m256 x) {
  const __m256i n = _mm256_cvtps_epi32(x);
  const __m256 f = x - _mm256_cvtepi32_ps(n);
  __m256 p = _mm256_set1_ps(1.326472615e-03f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.671512991e-03f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550733581e-02f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402224243e-01f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931470037e-01f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(n, 23));
  const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-125.0f), _CMP_LT_OQ);  // false for NaN
  return _mm256_andnot_ps(tiny, _mm256_castsi256_ps(power));
}
DLM_SIMD Floats exp2_nonpositive(Floats x) {
  return {exp2_nonpositive(x.low), exp2_nonpositive(x.high)};
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

}  // namespace dlm::cpu::avx2
