// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/carriers.h"

namespace check {
namespace {

using Fault = dlm::cuda::RowFault;

template <Fault fault>
std::string attempt() {
  RowCase c(2, 603, 3, 7);  // the shares leave the second warp without work
  dlm::cuda::row_reduce<fault>(c.params(), c.rows, nullptr);
  return c.wrong();
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"row_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"row_missing_barrier", attempt<Fault::kMissingBarrier>, "value", "value", "race", ""},
    {"row_overread", attempt<Fault::kOverread>, "?", "asan", "?", ""},
    {"row_smem_overrun", attempt<Fault::kSmemOverrun>, "value", "asan", "value", "value"},
    {"row_unmasked_tail", attempt<Fault::kUnmaskedTail>, "value", "value", "value", ""},
    {"row_wrong_splits", attempt<Fault::kWrongSplits>, "value", "value", "race", ""},
    {"row_relaxed_counter", attempt<Fault::kRelaxedCounter>, "-", "-", "race", ""},
    {"row_divergent_shuffle", attempt<Fault::kDivergentShuffle>, "simt", "simt", "simt", ""},
    {"row_early_exit", attempt<Fault::kEarlyExit>, "simt", "simt", "simt", ""},
    {"row_wrong_mask", attempt<Fault::kWrongMask>, "simt", "simt", "simt", ""},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
