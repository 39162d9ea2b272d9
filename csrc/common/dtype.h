// SPDX-License-Identifier: Apache-2.0
// Element types and their conversions to and from float, done on the bits, so that they are the
// same for every compiler and processor.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DLM_HD __host__ __device__ inline
#else
// Always inlined. Otherwise a compiler could emit an out-of-line copy in a file built for wider
// instructions, and the linker could keep that copy for all files, even on processors that lack
// those instructions.
#define DLM_HD inline __attribute__((always_inline))
#endif

namespace dlm {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
DLM_HD int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }  // bytes

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DLM_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
DLM_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
DLM_HD uint64_t double_to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DLM_HD float to_float(float x) { return x; }
DLM_HD float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DLM_HD float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // Uses masks instead of branches, so that compilers vectorize it. The exponent moves by 112, and
  // that of infinity and NaN by another 112; a subnormal half is a small integer times 2^-24, which
  // is exact in float.
  const uint32_t special = 0u - uint32_t(magnitude >= 0x7c00),
                 subnormal = 0u - uint32_t(magnitude < 0x0400);
  const uint32_t moved = (magnitude << 13) + 0x38000000 + (special & 0x38000000);
  const uint32_t counted = float_to_bits(float(int32_t(magnitude)) * 5.9604644775390625e-8f);
  return bits_to_float(sign | (subnormal & counted) | (~subnormal & moved));
}

template <class T>
DLM_HD T from_float(float x);
template <>
DLM_HD float from_float<float>(float x) {
  return x;
}
template <>
DLM_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // keep NaN a NaN
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // round to nearest even
}
template <>
DLM_HD Float16 from_float<Float16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or beyond
  if (magnitude < 0x38800000) {
    // Adding one half aligns the last bit kept with float's own rounding point.
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | uint16_t(float_to_bits(aligned) - 0x3f000000))};
  }
  return {
      uint16_t(sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

}  // namespace dlm
