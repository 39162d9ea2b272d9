// SPDX-License-Identifier: Apache-2.0
// Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", SC 2011).
//   key     = the request's 64-bit seed
//   counter = (position in the request, denoising step, stream + 256 * redraw, index / 4), word
//   index % 4
// A draw depends only on the request: not on its batch, its slot, the tiling or the device. The
// transforms below use only single IEEE-754 additions, multiplications and divisions (exact.h), so
// they also give the same bits everywhere; reference/randomness.py restates them in torch.
#pragma once
#include "common/exact.h"

namespace dlm {

enum class Stream : uint32_t {
  kToken = 0,
  kOrder = 1,
  kBernoulli = 2,
  kRenoise = 3,
  kVerify = 4,
  kResidual = 5,
  kChunk = 6,
  kResidualChunk = 7
  // 8 and 9 are drawn only in torch: reference/randomness.py
};

// The stream for drawing a position again within a step after its earlier draws were rejected;
// `redraw` counts the rejections.
DLM_HD Stream redrawn(Stream stream, uint32_t redraw) {
  return Stream(uint32_t(stream) + (redraw << 8));
}

struct Philox4 {
  uint32_t word[4];
};

DLM_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                         uint32_t k1) {
  const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c1 = uint32_t(p1);
  c3 = uint32_t(p0);
}

DLM_HD Philox4 philox(uint64_t seed, uint32_t position, uint32_t step, Stream stream,
                      uint32_t index4) {
  uint32_t c0 = position, c1 = step, c2 = uint32_t(stream), c3 = index4;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Natural logarithm of a positive normal float: Cephes' logf polynomial (Moshier), with each
// operation rounded separately.
DLM_HD float plain_log(float x) {
  uint32_t bits = float_to_bits(x);
  // Mantissa in [sqrt(1/2), sqrt(2)), so that the result keeps its relative accuracy around x = 1.
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
  bits -= uint32_t(exponent) << 23;
  const float f = add_rn(bits_to_float(bits), -1.0f);
  const float z = mul_rn(f, f);
  float p = 7.0376836292e-2f;
  p = mul_add_rn(p, f, -1.1514610310e-1f);
  p = mul_add_rn(p, f, 1.1676998740e-1f);
  p = mul_add_rn(p, f, -1.2420140846e-1f);
  p = mul_add_rn(p, f, 1.4249322787e-1f);
  p = mul_add_rn(p, f, -1.6668057665e-1f);
  p = mul_add_rn(p, f, 2.0000714765e-1f);
  p = mul_add_rn(p, f, -2.4999993993e-1f);
  p = mul_add_rn(p, f, 3.3333331174e-1f);
  p = mul_rn(mul_rn(p, f), z);
  const float e = float(exponent);
  p = mul_add_rn(e, -2.12194440e-4f, p);
  p = mul_add_rn(-0.5f, z, p);
  return mul_add_rn(e, 0.693359375f, add_rn(f, p));
}

// Standard exponential variate from 32 random bits: -log1p(-u), u = (r + 1/2) / 2^32. Small u give
// small variates, and log1p keeps them exact (down to 2^-33) where log(1 - u) in float would be 0.
DLM_HD float exponential(uint32_t r) {
  float u = mul_rn(add_rn(float(r), 0.5f), 2.3283064365386963e-10f);
  u = u < 0.99999994f ? u : 0.99999994f;
  const float y = add_rn(1.0f, -u);
  const float lost =
      add_rn(add_rn(1.0f, -y), -u);  // y = 1 - u - rounding; log1p(-u) = log(y) + lost / y
  return -add_rn(plain_log(y), div_rn(lost, y));
}

// Standard Gumbel variate from 32 random bits, up to 22.9.
DLM_HD float gumbel(uint32_t r) { return -plain_log(exponential(r)); }

// True with probability p; never for 0, always for 1.
DLM_HD bool bernoulli(uint32_t r, float p) { return double(r) < double(p) * 4294967296.0; }

// Uniform integer in [0, n), n <= 2^32; the bias is below n / 2^32.
DLM_HD uint32_t uniform_below(uint32_t r, uint32_t n) { return uint32_t(uint64_t(r) * n >> 32); }

}  // namespace dlm
