// SPDX-License-Identifier: Apache-2.0
// What translated PTX calls: bit casts, memory, and the instructions that C++ has no operator for.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "simt/ptx_model.h"

namespace ptx_run {

namespace ptx = dlm::cuda::ptx;

template <class T, class S>
T bits(S value) {
  static_assert(sizeof(T) == sizeof(S));
  T result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

// Volatile: each access happens, where and as often as the PTX says, so the sanitizers see it.
template <class T>
T load(uint64_t address) {
  return *reinterpret_cast<const volatile T*>(address);
}
template <class T>
void store(uint64_t address, std::type_identity_t<T> value) {
  *reinterpret_cast<volatile T*>(address) = value;
}
inline uint64_t shared(uint32_t address) {
  return reinterpret_cast<uint64_t>(simt::smem_pointer(address, 1, "shared access"));
}

// Shifts by the register's width or more give 0, or copies of the sign.
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(0) : T(std::make_unsigned_t<T>(a) << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(std::is_signed_v<T> && a < 0 ? -1 : 0) : T(a >> n);
}
inline uint32_t funnel(bool left, bool clamp, uint32_t low, uint32_t high, uint32_t n) {
  n = clamp ? (n < 32 ? n : 32) : n & 31;
  const uint64_t pair = uint64_t(high) << 32 | low;
  return left ? uint32_t(pair << n >> 32) : uint32_t(pair >> n);
}
template <class T>
T high_product(T a, T b) {
  using Wide =
      std::conditional_t<sizeof(T) == 8,
                         std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                         std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return T(Wide(a) * b >> sizeof(T) * 8);
}
template <class T>
T quotient(T a, T b) {  // an integer division by zero does not trap
  return b == 0                              ? T(-1)
         : std::is_signed_v<T> && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a))
                                             : T(a / b);
}
template <class T>
T remainder(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i)
    r |= (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
  return r;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> i * 4 & 15;
    uint32_t byte = bytes >> (select & 7) * 8 & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << i * 8;
  }
  return r;
}
template <class T>
T bfi(T field, T into, uint32_t position, uint32_t length) {
  constexpr uint32_t width = sizeof(T) * 8;
  position &= 255;
  length &= 255;
  if (position >= width || length == 0) return into;
  const T mask = (length >= width ? ~T(0) : (T(1) << length) - 1) << position;
  return (into & ~mask) | (field << position & mask);
}
// How far the highest bit is from the top.
inline uint32_t bfind_shift(uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : ~0u; }
inline uint32_t bfe_u32(uint32_t a, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  return position >= 32 || length == 0 ? 0
                                       : a >> position & (length >= 32 ? ~0u : (1u << length) - 1);
}
inline uint32_t brev(uint32_t a) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
  return r;
}

// Only the upper word of argument and result counts: relative error 2^-20. Subnormals are zero.
inline double rcp_gross(double x) {
  constexpr uint64_t upper = 0xffffffff00000000ull;
  x = bits<double>(bits<uint64_t>(x) & upper);
  const double y = 1 / (std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x);
  return std::fabs(y) < 0x1p-1022 ? std::copysign(0.0, y) : bits<double>(bits<uint64_t>(y) & upper);
}

// Float to integer: out of range goes to the nearest end, NaN to zero.
template <class T>
T to_integer(double rounded) {
  if (rounded != rounded) return 0;
  if (rounded <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (rounded >= double(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(rounded);
}

// shfl.sync with the c operand as PTX packs it; the high word says whether the source was in range.
inline uint64_t shuffle(char mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c,
                        SIMT_SITE) {
  const int lane = simt::lane(), clamp = c & 31, segment = c >> 8 & 31, by = b & 31;
  const int lowest = lane & segment, limit = lowest | (clamp & ~segment);
  const int from = mode == 'u'   ? lane - by
                   : mode == 'd' ? lane + by
                   : mode == 'b' ? lane ^ by
                                 : lowest | (by & ~segment);
  const bool in_range = mode == 'u' ? from >= limit : from <= limit;
  return uint64_t(in_range) << 32 |
         simt::shuffle(mask, value, in_range ? from : -1, "shfl.sync", site);
}
inline void cp_async_16(uint32_t to, uint64_t from, uint32_t source_bytes, SIMT_SITE) {
  if (source_bytes != 0 && source_bytes != 16)
    simt::fail("cp.async: %u source bytes, 0 or 16 expected", source_bytes);
  ptx::cp_async_16(to, reinterpret_cast<const void*>(from), source_bytes != 0, site);
}

}  // namespace ptx_run
