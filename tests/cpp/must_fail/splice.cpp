// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/splice_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::SpliceFault;

// A few cases that between them reach every line of the kernel; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  uint64_t seed = 1;
  for (const auto& [T, W] : {std::pair{900, 40}, {601, 300}, {1500, 200}}) {
    for (const unsigned with :
         {0x37u, 0x3fu & ~4u, 0x77u, 0x73u, 0x35u, 0xb7u, 0xb6u, 0xb6u, 0x36u}) {
      SpliceCase c(3, T, W, with, ++seed);
      dlm::cuda::start_splice<fault>(c.p, nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"splice_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"splice_totals_read_too_early", attempt<Fault::kTotalsReadTooEarly>, "simt", "simt", "race", kNotRun},
    {"splice_moves_too_early", attempt<Fault::kMovesTooEarly>, "value", "value", "race", kNotRun},
    {"splice_always_from_the_left", attempt<Fault::kAlwaysFromTheLeft>, "value", "value", "race", kNotRun},
    {"splice_keeps_overfilled", attempt<Fault::kKeepsOverfilled>, "value", "value", "race", kNotRun},
    {"splice_removes_frozen", attempt<Fault::kRemovesFrozen>, "value", "value", "value", kNotRun},
    {"splice_dirty_travels", attempt<Fault::kDirtyTravels>, "value", "value", "value", kNotRun},
    {"splice_trusts_lengths", attempt<Fault::kTrustsLengths>, "value", "asan", "value", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
