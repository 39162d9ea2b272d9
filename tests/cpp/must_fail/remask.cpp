// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/remask_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::RemaskFault;

// A few cases that between them reach every line of the kernel; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  uint64_t seed = 1;
  for (const auto& [T, W] : {std::pair{33, 9}, {700, 70}, {600, 300}}) {
    for (const unsigned with : {0x1ffu, 0xffu, 0x7ffu, 0xc3u, 0x7bfu, 0xf1u, 0x8ffu, 0xfffu}) {
      RemaskCase c(3, T, W, with, ++seed);
      dlm::cuda::start_remask<fault>(c.p, nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"remask_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"remask_searches_too_early", attempt<Fault::kSearchesTooEarly>, "value", "value", "race", kNotRun},
    {"remask_partials_read_too_early", attempt<Fault::kPartialsReadTooEarly>, "simt", "simt", "race", kNotRun},
    {"remask_fills_too_early", attempt<Fault::kFillsTooEarly>, "value", "value", "race", kNotRun},
    {"remask_last_slot_wins", attempt<Fault::kLastSlotWins>, "value", "value", "value", kNotRun},
    {"remask_trusts_positions", attempt<Fault::kTrustsPositions>, "crash", "asan", "crash", kNotRun},
    {"remask_skips_sort", attempt<Fault::kSkipsSort>, "value", "value", "race", kNotRun},
    {"remask_odd_tail", attempt<Fault::kOddTail>, "value", "asan", "value", kNotRun},
    {"remask_keeps_overfilled", attempt<Fault::kKeepsOverfilled>, "value", "value", "value", kNotRun},
    {"remask_no_origin", attempt<Fault::kNoOrigin>, "value", "value", "value", kNotRun},
    {"remask_ends_before_given", attempt<Fault::kEndsBeforeGiven>, "value", "value", "value", kNotRun},
    {"remask_no_end", attempt<Fault::kNoEnd>, "value", "value", "value", kNotRun},
    {"remask_keeps_records", attempt<Fault::kKeepsRecords>, "value", "value", "value", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
