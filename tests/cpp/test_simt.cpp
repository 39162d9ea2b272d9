// SPDX-License-Identifier: Apache-2.0
// The machine under the tests: what it must notice by itself, and what it reports.
#include <cstring>

#include "check.h"
#include "cuda/ptx.cuh"
#include "ptx/ptx_run.h"

using namespace check;
using namespace dlm::cuda;

namespace {

struct Params {
  uint32_t* out;
  int32_t choice;
};

void deadlock_kernel(const Params) {
  if (threadIdx.x < 32) {
    ptx::barrier_sync(1, 64);
  } else {
    ptx::barrier_sync(2, 64);
  }
}
void polling_kernel(const Params p) {
  while (ptx::load_acquire(p.out) == 0) ptx::spin_pause();
}
void smem_kernel(const Params p) {
  SmemCarver smem;
  float* x = smem.take<float>(32);
  p.out[threadIdx.x] = __float_as_uint(x[threadIdx.x]);
  smem.take<float>(uint32_t(p.choice));
}
void index_kernel(const Params p) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  p.out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1;
}
void two_masks_kernel(const Params p) {
  if (threadIdx.x < 16) {
    p.out[threadIdx.x] = __reduce_add_sync(0xffff, threadIdx.x);
  } else {
    p.out[threadIdx.x] = __reduce_add_sync(0xffff0000, threadIdx.x);
  }
}
void misaligned_kernel(const Params p) { p.out[0] = ptx::ld_global_16(p.out + 1).x; }

// The fault that a launch reports; empty: none.
std::string fault(void (*kernel)(Params), dim3 grid, dim3 block, size_t smem, const Params& p) {
  try {
    simt::launch(kernel, grid, block, smem, p);
    return "";
  } catch (const simt::Error& e) {
    return e.what();
  }
}
void expect_fault(const std::string& got, const char* part) {
  CHECK(got.find(part) != got.npos, "expected \"%s\", got \"%s\"", part, got.c_str());
}

}  // namespace

TEST(every_thread_runs_once) {
  for_each_schedule([] {
    std::vector<uint32_t> out(2 * 3 * 4 * 70);
    CHECK(fault(index_kernel, dim3(2, 3, 4), dim3(5, 7, 2), 0, {out.data(), 0}).empty(), "fault");
    for (size_t i = 0; i < out.size(); ++i) {
      if (out[i] != 1) CHECK(false, "thread %zu ran %u times", i, out[i]);
    }
  });
}

TEST(deadlock_is_listed) {
  const std::string s = fault(deadlock_kernel, 1, 64, 0, {nullptr, 0});
  expect_fault(s, "deadlock:");
  expect_fault(s, "32 threads wait in bar.sync at");
  uint32_t never = 0;
  expect_fault(fault(polling_kernel, 1, 1, 0, {&never, 0}), "1 threads wait in a polling loop");
}

TEST(launch_limits) {
  uint32_t out[32];
  expect_fault(fault(smem_kernel, 1, 1025, 0, {out, 0}), "block of 1025");
  expect_fault(fault(smem_kernel, dim3(1, 65536), 32, 0, {out, 0}), "grid of 1 x 65536");
  expect_fault(fault(smem_kernel, 1, 32, 300 * 1024, {out, 0}),
               "307200 bytes of dynamic shared memory");
  expect_fault(fault(smem_kernel, 1, 32, 128, {out, 4}),
               "takes 144 bytes and was launched with 128");
}

TEST(shared_memory_is_poisoned) {
  std::vector<uint32_t> out(32);
  for (int turn = 0; turn < 2; ++turn) {
    CHECK(fault(smem_kernel, 1, 32, 256, {out.data(), 1}).empty(), "fault");
    CHECK(std::isnan(__uint_as_float(out[5])), "read %08x", out[5]);
  }
}

TEST(disjoint_masks_may_meet_apart) {
  for_each_schedule([] {
    std::vector<uint32_t> out(32);
    const std::string s = fault(two_masks_kernel, 1, 32, 0, {out.data(), 0});
    CHECK(s.empty() && out[0] == 120 && out[31] == 376, "%s %u %u", s.c_str(), out[0], out[31]);
  });
}

TEST(misaligned_access) {
  alignas(16) uint32_t x[8] = {};
  expect_fault(fault(misaligned_kernel, 1, 1, 0, {x, 0}), "not a multiple of 16");
}

// "Integer Arithmetic Instructions: bfi, bfind": what lies beyond the register falls away.
TEST(bit_fields) {
  const uint32_t a = 0xabcdef12;
  const uint64_t b = 0x1122334455667788;
  CHECK(ptx_run::bfi<uint32_t>(a, 0, 8, 16) == 0x00ef1200, "inside");
  CHECK(ptx_run::bfi<uint32_t>(a, ~0u, 24, 32) == 0x12ffffff, "over the end");
  CHECK(ptx_run::bfi<uint32_t>(a, 7, 32, 8) == 7 && ptx_run::bfi<uint32_t>(a, 7, 3, 0) == 7,
        "none");
  CHECK(ptx_run::bfi<uint64_t>(a, b, 32, 32) == 0xabcdef1255667788, "upper half");
  CHECK(ptx_run::bfi<uint64_t>(b, a, 0, 64) == b, "whole");
  CHECK(ptx_run::bfind_shift(0x00ffu) == 24 && ptx_run::bfind_shift(0) == ~0u, "highest bit");
}

// "Floating Point Instructions: rcp.approx.ftz.f64".
TEST(gross_reciprocal) {
  const double y = ptx_run::rcp_gross(3.0);
  CHECK(std::fabs(y * 3 - 1) < 0x1p-20 && y != 1 / 3.0, "1/3 is %.17g", y);
  CHECK(ptx_run::rcp_gross(-0.25) == -4 && ptx_run::rcp_gross(0.0) == INFINITY, "exact");
  CHECK(ptx_run::rcp_gross(-1e-310) == -INFINITY && ptx_run::rcp_gross(1e308) == 0, "subnormal");
}
