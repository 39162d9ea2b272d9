// SPDX-License-Identifier: Apache-2.0
// What this processor can do in a second, for harness.py: multiplications and additions in
// registers, in one thread. Compiled with -march=native where it runs.
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kSums =
    kBytes == 64 ? 20 : 10;  // enough to hide the latency, few enough for registers
typedef float Vector __attribute__((vector_size(kBytes)));

}  // namespace

extern "C" {

// Operations done.
double multiply_add_float(long repeats) {
  Vector sum[kSums], x = Vector{} + 0.9999f;
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) sum[i] = Vector{} + float(i);
  for (long k = 0; k < repeats; ++k) {
    asm volatile("" : "+m"(x));
#pragma GCC unroll 20
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * x + x;
  }
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) asm volatile("" ::"x"(sum[i]));
  return 2.0 * repeats * kSums * (kBytes / 4);
}

// The same with pairs of bf16; 0 where the processor has no instruction for it.
double multiply_add_bfloat16(long repeats) {
#if defined(__AVX512BF16__)
  __m512 sum[kSums];
  __m512i x = _mm512_set1_epi32(0x3f003f00);
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_set1_ps(float(i));
  for (long k = 0; k < repeats; ++k) {
    asm volatile("" : "+m"(x));
#pragma GCC unroll 20
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)x, (__m512bh)x);
  }
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) asm volatile("" ::"x"(sum[i]));
  return 4.0 * repeats * kSums * 16;
#else
  (void)repeats;
  return 0;
#endif
}
}
