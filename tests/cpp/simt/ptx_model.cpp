// SPDX-License-Identifier: Apache-2.0
// The warp-wide instructions: which lane's register holds which element. Compiled without
// sanitizers.
#include "simt/ptx_model.h"

#include "common/dtype.h"

namespace simt {

float half_to_float(uint32_t bits) { return dlm::to_float(dlm::Float16{uint16_t(bits)}); }
uint32_t float_to_half(float x) {  // every NaN becomes the one NaN
  return x != x ? 0x7fff : dlm::from_float<dlm::Float16>(x).bits;
}
uint32_t float_to_bf16(float x) { return x != x ? 0x7fff : dlm::from_float<dlm::BFloat16>(x).bits; }
float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

template <int count, bool trans>
void ldmatrix_lanes(uint32_t mask, Operands* lanes) {
  if (mask != ~0u) fail("ldmatrix: needs the whole warp, mask is %08x", mask);
  for (int m = 0; m < count; ++m) {
    const auto element = [&](int row, int column) {
      const uint32_t word =
          static_cast<const LdmatrixOperand*>(lanes[m * 8 + row].in)->row[column / 2];
      return word >> (column % 2 * 16) & 0xffff;
    };
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4 * 2;
      static_cast<uint32_t*>(lanes[i].out)[m] =
          trans ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
  }
  ++counters().ldmatrix;
}
template void ldmatrix_lanes<1, false>(uint32_t, Operands*);
template void ldmatrix_lanes<2, false>(uint32_t, Operands*);
template void ldmatrix_lanes<4, false>(uint32_t, Operands*);
template void ldmatrix_lanes<1, true>(uint32_t, Operands*);
template void ldmatrix_lanes<2, true>(uint32_t, Operands*);
template void ldmatrix_lanes<4, true>(uint32_t, Operands*);

template <bool bf16>
void mma_m16n8k16_lanes(uint32_t mask, Operands* lanes) {
  if (mask != ~0u) fail("mma: needs the whole warp, mask is %08x", mask);
  const auto low = [](uint32_t w) {
    return bf16 ? __uint_as_float(w << 16) : half_to_float(w & 0xffff);
  };
  const auto high = [](uint32_t w) {
    return bf16 ? __uint_as_float(w & 0xffff0000u) : half_to_float(w >> 16);
  };
  float a[16][16], b[16][8], c[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto& in = *static_cast<const MmaOperand*>(lanes[i].in);
    const auto* acc = static_cast<const float*>(lanes[i].out);
    const int g = i / 4, t = i % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      a[g + r % 2 * 8][t + r / 2 * 8] = low(in.a[r]);
      a[g + r % 2 * 8][t + r / 2 * 8 + 1] = high(in.a[r]);
      c[g + r / 2 * 8][t + r % 2] = acc[r];
    }
    for (int r = 0; r < 2; ++r) {
      b[t + r * 8][g] = low(in.b[r]);
      b[t + r * 8 + 1][g] = high(in.b[r]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int i = 0; i < 32; ++i) {
    auto* acc = static_cast<float*>(lanes[i].out);
    const int g = i / 4, t = i % 4 * 2;
    for (int r = 0; r < 4; ++r) acc[r] = c[g + r / 2 * 8][t + r % 2];
  }
  ++counters().mma;
}
template void mma_m16n8k16_lanes<true>(uint32_t, Operands*);
template void mma_m16n8k16_lanes<false>(uint32_t, Operands*);

}  // namespace simt
