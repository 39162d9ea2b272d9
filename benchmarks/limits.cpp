// SPDX-License-Identifier: Apache-2.0
// Peak rates of this processor for harness.py: multiply-adds and exponentials in registers, in one
// thread. Compiled with -march=native on the machine that runs it.
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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
typedef int Integers __attribute__((vector_size(kBytes)));

}  // namespace

extern "C" {

// Multiply-adds of fp32 values. Returns the number of operations.
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

// Multiply-adds of bf16 pairs. Returns 0 if the processor has no instruction for it.
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

// Multiply-adds in tile registers. Returns 0 if there are none or the system denies their use.
double multiply_add_tiles(long repeats) {
#if defined(__AMX_BF16__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // see csrc/cpu/isa.cpp
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("" : "+m"(shapes));
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (long k = 0; k < repeats; ++k) {  // four sums hide the latency
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * repeats;
#else
  (void)repeats;
  return 0;
#endif
}

// Exponentials: 2^x of small x to float accuracy, in as few steps as possible (rounding to the
// nearest integer by adding 1.5 * 2^23, a polynomial of degree 5 for the rest, and adding the
// integer to the exponent). Unlike in an op, no range is checked and nothing is loaded or summed.
// Returns the number of exponentials.
double exponentials(long repeats) {
  constexpr int kAtOnce = 8;
  Vector x[kAtOnce];
#pragma GCC unroll 8
  for (int i = 0; i < kAtOnce; ++i) x[i] = Vector{} - 0.37f * float(i);
  for (long k = 0; k < repeats; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      asm volatile("" : "+x"(x[i]));
      const Vector shifted = x[i] + 12582912.0f, f = x[i] - (shifted - 12582912.0f);
      Vector p = Vector{} + 1.326472615e-03f;
      p = p * f + 9.671512991e-03f;
      p = p * f + 5.550733581e-02f;
      p = p * f + 2.402224243e-01f;
      p = p * f + 6.931470037e-01f;
      p = p * f + 1.0f;
      const Vector power = (Vector)((Integers)p + ((Integers)shifted << 23));
      asm volatile("" ::"x"(power));
    }
  }
  return double(repeats) * kAtOnce * (kBytes / 4);
}
}
