// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/carriers.h"

namespace check {
namespace {

using Fault = dlm::cuda::TileFault;

template <Fault fault>
std::string attempt() {
  TileCase c(63, 28, 104, 5);
  dlm::cuda::tile_product<fault>(c.params(), nullptr);
  return c.wrong();
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"tile_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"tile_no_barrier_after_wait", attempt<Fault::kNoBarrierAfterWait>, "value", "value", "race", ""},
    {"tile_no_barrier_at_end", attempt<Fault::kNoBarrierBeforeReuse>, "value", "value", "race", ""},
    {"tile_lax_wait", attempt<Fault::kLaxWait>, "value", "value", "value", ""},
    {"tile_swapped_registers", attempt<Fault::kSwappedRegisters>, "value", "value", "value", ""},
    {"tile_overread", attempt<Fault::kOverread>, "?", "asan", "?", ""},
    {"tile_smem_overrun", attempt<Fault::kSmemOverrun>, "value", "asan", "race", "value"},
    {"tile_unmasked_tail", attempt<Fault::kUnmaskedTail>, "value", "value", "value", ""},
    {"tile_missing_syncwarp", attempt<Fault::kMissingSyncwarp>, "value", "value", "race", ""},
    {"tile_divergent_barrier", attempt<Fault::kDivergentBarrier>, "simt", "simt", "simt", ""},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
