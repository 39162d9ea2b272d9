// SPDX-License-Identifier: Apache-2.0
// Stand-in for the CUDA toolkit's headers: the keywords, types and intrinsics that kernels may use,
// and no others.
// __shared__, __constant__ and __activemask are missing on purpose.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)
constexpr int warpSize = 32;

#define SIMT_VECTOR_TYPES(T, NAME)                                   \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                 \
  struct NAME##3 { T x, y, z; };                                     \
  struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };           \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }         \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; } \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR_TYPES(int, int)
SIMT_VECTOR_TYPES(unsigned, uint)
SIMT_VECTOR_TYPES(float, float)
#undef SIMT_VECTOR_TYPES

// --- runtime: device memory is host memory, a launch has finished when it returns ---
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

namespace simt {

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes,
                   const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  launch(reinterpret_cast<const void*>(kernel), grid, block, smem_bytes, &params, sizeof params,
         [](const void* k, const void* p) {
           reinterpret_cast<void (*)(Params)>(const_cast<void*>(k))(*static_cast<const Params*>(p));
         });
  return cudaSuccess;
}

inline int lane() { return int(current->lane); }

// `source` is the lane to read from, -1 for one's own.
template <class T>
T shuffle(uint32_t mask, T value, int source, const char* name, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Lane {
    T value;
    int source;
  };
  const Lane in{value, source};
  T out;
  const WarpFunction exchange = [](uint32_t m, Operands* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(m >> i & 1)) continue;
      int from = static_cast<const Lane*>(lanes[i].in)->source;
      if (from < 0) from = i;
      if (!(m >> from & 1))
        fail("shuffle: lane %d reads lane %d, which is not in mask %08x", i, from, m);
      *static_cast<T*>(lanes[i].out) = static_cast<const Lane*>(lanes[from].in)->value;
    }
  };
  collective(mask, name, exchange, &in, &out, false, site);
  return out;
}

template <class Combine, class T>
T reduce(uint32_t mask, T value, const char* name, Site site) {
  T out;
  const WarpFunction combine = [](uint32_t m, Operands* lanes) {
    T all{};
    bool first = true;
    for (int i = 0; i < 32; ++i) {
      if (!(m >> i & 1)) continue;
      const T x = *static_cast<const T*>(lanes[i].in);
      all = first ? x : Combine{}(all, x);
      first = false;
    }
    for (int i = 0; i < 32; ++i) {
      if (m >> i & 1) *static_cast<T*>(lanes[i].out) = all;
    }
  };
  collective(mask, name, combine, &value, &out, false, site);
  return out;
}

}  // namespace simt

#define SIMT_SITE simt::Site site = simt::Site::current()

// --- synchronisation and warp intrinsics ---
inline void __syncthreads(SIMT_SITE) { simt::barrier(0, 0, site); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  simt::collective(mask, "__syncwarp", nullptr, nullptr, nullptr, true, site);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_SITE) {
  const int base = simt::lane() / width * width;
  return simt::shuffle(mask, v, base + (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, SIMT_SITE) {
  const int base = simt::lane() / width * width, source = simt::lane() ^ bits;
  return simt::shuffle(mask, v, source < base + width ? source : -1, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  const int base = simt::lane() / width * width, source = simt::lane() + int(delta);
  return simt::shuffle(mask, v, source < base + width ? source : -1, "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  const int base = simt::lane() / width * width, source = simt::lane() - int(delta);
  return simt::shuffle(mask, v, source >= base ? source : -1, "__shfl_up_sync", site);
}

#define SIMT_REDUCE(NAME, T, EXPRESSION)                  \
  inline T NAME(unsigned mask, T v, SIMT_SITE) {          \
    struct Combine {                                      \
      T operator()(T a, T b) const { return EXPRESSION; } \
    };                                                    \
    return simt::reduce<Combine>(mask, v, #NAME, site);   \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SIMT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SIMT_REDUCE
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  struct Or {
    unsigned operator()(unsigned a, unsigned b) const { return a | b; }
  };
  return simt::reduce<Or>(mask, predicate ? 1u << simt::lane() : 0u, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// --- atomics: relaxed, as on the device. To order other memory: ptx::atomic_add_acq_rel and its
// kin ---
template <class T>
T atomicAdd(T* p, T v) {
  static_assert(std::is_integral_v<T>,
                "float atomics would make results depend on the order of threads");
  simt::maybe_yield();
  simt::memory_changed();
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T v) {
  simt::maybe_yield();
  simt::memory_changed();
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < v &&
         !__atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicMin(T* p, T v) {
  simt::maybe_yield();
  simt::memory_changed();
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < seen &&
         !__atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicOr(T* p, T v) {
  simt::maybe_yield();
  simt::memory_changed();
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, T v) {
  simt::maybe_yield();
  simt::memory_changed();
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  simt::maybe_yield();
  simt::memory_changed();
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// --- arithmetic intrinsics ---
inline float __int_as_float(int i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
inline float __uint_as_float(unsigned u) { return __int_as_float(int(u)); }
inline int __float_as_int(float f) {
  int i;
  memcpy(&i, &f, 4);
  return i;
}
inline unsigned __float_as_uint(float f) { return unsigned(__float_as_int(f)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
