// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/select_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::SelectFault;

// A few cases that between them reach every line of the kernel; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  uint64_t seed = 1;
  for (const int64_t W : {5, 90, 200, 400}) {
    for (int rule = 0; rule < 7; ++rule) {
      for (const unsigned with :
           {SelectCase::kFill | SelectCase::kNeed, SelectCase::kCap | SelectCase::kGate | 0u,
            SelectCase::kGate | SelectCase::kFill | SelectCase::kNeed | 0u}) {
        SelectCase c(3, W, dlm::Rule(rule), with, ++seed);
        dlm::cuda::start_select_tokens<fault>(c.p, nullptr);
        if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"select_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"select_sort_reads_too_early", attempt<Fault::kSortReadsTooEarly>, "value", "value", "race", kNotRun},
    {"select_sort_writes_too_early", attempt<Fault::kSortWritesTooEarly>, "value", "value", "race", kNotRun},
    {"select_sort_stops_early", attempt<Fault::kSortStopsEarly>, "value", "value", "value", kNotRun},
    {"select_limit_read_too_early", attempt<Fault::kLimitReadTooEarly>, "value", "value", "race", kNotRun},
    {"select_totals_read_too_early", attempt<Fault::kTotalsReadTooEarly>, "value", "value", "race", kNotRun},
    {"select_unmasked_tail", attempt<Fault::kUnmaskedTail>, "value", "asan", "value", kNotRun},
    {"select_high_slot_wins_ties", attempt<Fault::kHighSlotWinsTies>, "value", "value", "value", kNotRun},
    {"select_rank_off_by_one", attempt<Fault::kRankOffByOne>, "value", "value", "value", kNotRun},
    {"select_fill_within_gate", attempt<Fault::kFillWithinGate>, "value", "value", "value", kNotRun},
    {"select_sums_within_warp", attempt<Fault::kSumsWithinWarp>, "value", "value", "value", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
