// SPDX-License-Identifier: Apache-2.0
// What each function of csrc/cuda/ptx.cuh does, on the host. Memory is touched here, inlined into
// the kernel and in the name of the lane that issues the instruction, so that the sanitizers blame
// the right line; what passes between lanes is in ptx_model.cpp, which is never instrumented.
#pragma once
#include "simt/cuda.h"

namespace simt {

struct LdmatrixOperand {
  uint32_t address, row[4];
};
struct MmaOperand {
  uint32_t a[4], b[2];
};
template <int count, bool trans>
void ldmatrix_lanes(uint32_t mask, Operands* lanes);
template <bool bf16>
void mma_m16n8k16_lanes(uint32_t mask, Operands* lanes);
float half_to_float(uint32_t bits);
uint32_t float_to_half(float x);
uint32_t float_to_bf16(float x);
float flush(float x);  // subnormals become zero

inline void check_aligned_16(uint32_t address, const char* what) {
  if (address % 16) fail("%s: shared address %#x is not a multiple of 16", what, address);
}

// ldmatrix of `count` matrices uses the addresses of the first 8 * count lanes.
template <int count, bool trans>
void ldmatrix(uint32_t* r, uint32_t address, Site site) {
  LdmatrixOperand in{address, {}};
  if (current->lane < 8 * count) {
    check_aligned_16(address, "ldmatrix");
    auto row = reinterpret_cast<const volatile uint32_t*>(smem_pointer(address, 16, "ldmatrix"));
    for (int i = 0; i < 4; ++i) in.row[i] = row[i];
    note_smem_16(address, site);
  }
  collective(~0u, trans ? "ldmatrix.trans" : "ldmatrix", ldmatrix_lanes<count, trans>, &in, r,
             false, site);
}

}  // namespace simt

namespace dlm::cuda::ptx {

// --- shared memory ---
inline uint32_t smem_address(const void* p) { return simt::smem_address(p); }
inline uint4 ld_shared_16(uint32_t address, SIMT_SITE) {
  simt::check_aligned_16(address, "ld.shared.v4");
  simt::note_smem_16(address, site);
  return *reinterpret_cast<const uint4*>(simt::smem_pointer(address, 16, "ld.shared.v4"));
}
inline void st_shared_16(uint32_t address, uint4 v, SIMT_SITE) {
  simt::check_aligned_16(address, "st.shared.v4");
  simt::note_smem_16(address, site);
  *reinterpret_cast<uint4*>(simt::smem_pointer(address, 16, "st.shared.v4")) = v;
}

// --- global memory ---
inline uint4 ld_global_16(const void* p, SIMT_SITE) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    simt::fail("ld.global.v4: %p is not a multiple of 16", p);
  simt::note_gmem(p, 16, site);
  return *static_cast<const uint4*>(p);
}
inline uint4 ld_global_stream_16(const void* p, SIMT_SITE) { return ld_global_16(p, site); }
inline void st_global_16(void* p, uint4 v, SIMT_SITE) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    simt::fail("st.global.v4: %p is not a multiple of 16", p);
  simt::note_gmem(p, 16, site);
  *static_cast<uint4*>(p) = v;
}
inline uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t v) {
  simt::maybe_yield();
  simt::memory_changed();
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline uint32_t load_acquire(const uint32_t* p) {
  simt::maybe_yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(uint32_t* p, uint32_t v) {
  simt::maybe_yield();
  simt::memory_changed();
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline void spin_pause(SIMT_SITE) { simt::spin_yield(site); }

// --- barriers ---
inline void barrier_sync(uint32_t id, uint32_t threads, SIMT_SITE) {
  simt::barrier(id, threads, site);
}
inline void barrier_arrive(uint32_t id, uint32_t threads, SIMT_SITE) {
  simt::barrier_arrive(id, threads, site);
}

// --- cp.async ---
inline void cp_async_16(uint32_t shared, const void* global, bool valid = true, SIMT_SITE) {
  if (valid) {  // a source out of bounds shows here, not at the wait
    auto source = static_cast<const volatile uint64_t*>(global);
    (void)source[0];
    (void)source[1];
    simt::note_gmem(global, 16, site);
  }
  simt::note_smem_16(shared, site);
  auto target = reinterpret_cast<volatile uint64_t*>(simt::smem_pointer(shared, 16, "cp.async"));
  target[0] = ~uint64_t(0);  // undefined until waited for: NaN
  target[1] = ~uint64_t(0);
  simt::cp_async(shared, global, 16, valid);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int pending>
void cp_async_wait() {
  simt::cp_async_wait(pending);
}

// --- matrices ---
template <int count>
void ldmatrix(uint32_t (&r)[count], uint32_t address, SIMT_SITE) {
  simt::ldmatrix<count, false>(r, address, site);
}
template <int count>
void ldmatrix_trans(uint32_t (&r)[count], uint32_t address, SIMT_SITE) {
  simt::ldmatrix<count, true>(r, address, site);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              SIMT_SITE) {
  const simt::MmaOperand in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::collective(~0u, "mma bf16", simt::mma_m16n8k16_lanes<true>, &in, c, false, site);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             SIMT_SITE) {
  const simt::MmaOperand in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::collective(~0u, "mma f16", simt::mma_m16n8k16_lanes<false>, &in, c, false, site);
}

// --- arithmetic ---
inline float exp2_approx(float x) { return simt::flush(exp2f(simt::flush(x))); }
inline float log2_approx(float x) { return log2f(simt::flush(x)); }
inline uint32_t pack_bf16(float low, float high) {
  return simt::float_to_bf16(low) | simt::float_to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return simt::float_to_half(low) | simt::float_to_half(high) << 16;
}
inline float2 unpack_bf16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
inline float2 unpack_f16(uint32_t pair) {
  return {simt::half_to_float(pair & 0xffff), simt::half_to_float(pair >> 16)};
}
inline float max_nan(float a, float b) {
  if (a != a || b != b) return __uint_as_float(0x7fffffff);
  return a > b || (a == b && !std::signbit(a)) ? a : b;  // +0 is above -0
}
inline uint32_t max_nan_bf16(uint32_t a, uint32_t b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(max_nan(x.x, y.x), max_nan(x.y, y.y));
}
inline uint32_t max_nan_f16(uint32_t a, uint32_t b) {
  const float2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(max_nan(x.x, y.x), max_nan(x.y, y.y));
}

}  // namespace dlm::cuda::ptx
