// SPDX-License-Identifier: Apache-2.0
// All inline assembly of the project, one function per instruction. Titles in quotes are sections
// of the PTX ISA manual. Needs sm_80. With DLM_SIMT the same functions come from
// tests/cpp/simt/ptx_model.h, which models them.
//
// Shared addresses are the 32-bit ones of smem_address(). `sync.aligned` instructions (ldmatrix,
// mma) must be executed by all 32 lanes of a warp together.
#pragma once
#include "cuda/device.h"

#ifdef DLM_SIMT
#include "simt/ptx_model.h"
#else

namespace dlm::cuda::ptx {

// --- shared memory -----------------------------------------------------------------------------

DLM_DEVICE uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// "Data Movement and Conversion Instructions: ld", 16 aligned bytes.
DLM_DEVICE uint4 ld_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
// "Data Movement and Conversion Instructions: st".
DLM_DEVICE void st_shared_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// --- global memory, 16 aligned bytes per lane --------------------------------------------------

// "Data Movement and Conversion Instructions: ld.global.nc": read once, constant during the kernel.
DLM_DEVICE uint4 ld_global_stream_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// "Data Movement and Conversion Instructions: ld": for data that other blocks may have written.
DLM_DEVICE uint4 ld_global_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// "Data Movement and Conversion Instructions: st".
DLM_DEVICE void st_global_16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// --- memory shared between blocks: "Memory Consistency Model" ----------------------------------

// "Parallel Synchronization and Communication Instructions: atom". Returns the previous value.
DLM_DEVICE uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(v)
               : "memory");
  return before;
}
DLM_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DLM_DEVICE void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Call this in every polling loop. "Miscellaneous Instructions: nanosleep".
DLM_DEVICE void spin_pause() { asm volatile("nanosleep.u32 32;" ::: "memory"); }

// --- barriers of part of a block: "Parallel Synchronization and Communication Instructions: bar"

// `id` is 1..15 (0 is __syncthreads); `threads`, a multiple of 32, is the number of threads that
// sync or arrive together.
DLM_DEVICE void barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DLM_DEVICE void barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- "Data Movement and Conversion Instructions: cp.async" -------------------------------------

// Starts copying 16 bytes from global to shared memory. If not `valid`, writes zeros and does not
// read `global`.
DLM_DEVICE void cp_async_16(uint32_t shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes this thread's current group of copies.
DLM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are still in flight. To wait for the copies
// of other threads, call __syncthreads afterwards.
template <int pending>
DLM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- "Warp-level matrix load instruction: ldmatrix": 1, 2 or 4 matrices of 8x8 16-bit elements -

// Lane 8*m+i provides the address of row i of matrix m; r[m] receives elements (lane/4, 2*(lane%4))
// and the next one. The trans forms give elements (2*(lane%4), lane/4) and the one below.
DLM_DEVICE void ldmatrix(uint32_t (&r)[1], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(address)
               : "memory");
}
DLM_DEVICE void ldmatrix(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
DLM_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
DLM_DEVICE void ldmatrix_trans(uint32_t (&r)[1], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(address)
               : "memory");
}
DLM_DEVICE void ldmatrix_trans(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
DLM_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// --- "Matrix Fragments for mma.m16n8k16 with floating point type" ------------------------------

// c[16x8] += a[16x16] b[16x8], float accumulation. With g = lane/4, t = 2*(lane%4):
//   a[0] (g, t) (g, t+1)   a[1] (g+8, t) ..   a[2] (g, t+8) ..   a[3] (g+8, t+8) ..
//   b[0] (t, g) (t+1, g)   b[1] (t+8, g) ..
//   c[0] (g, t)  c[1] (g, t+1)  c[2] (g+8, t)  c[3] (g+8, t+1)
DLM_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DLM_DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- arithmetic: "Floating Point Instructions", "cvt" ------------------------------------------

// 2^x with a relative error of at most 2^-22; subnormals are treated as zero. No `volatile` here:
// these instructions have no side effects and may be moved or dropped.
DLM_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) with an error of at most 2^-22: absolute for x in (0.5, 2), otherwise relative;
// subnormals are treated as zero.
DLM_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Converts two floats to two 16-bit elements, to nearest even; `low` goes to the low half.
DLM_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DLM_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DLM_DEVICE float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
DLM_DEVICE float2 unpack_f16(uint32_t pair) {
  float low, high;
  asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
  return make_float2(low, high);
}
// Returns the larger value, or NaN if either is NaN. "Floating Point Instructions: max", "Half
// Precision Floating Point Instructions: max".
DLM_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// The same for each half of two pairs.
DLM_DEVICE uint32_t max_nan_bf16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DLM_DEVICE uint32_t max_nan_f16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

}  // namespace dlm::cuda::ptx
#endif  // DLM_SIMT
