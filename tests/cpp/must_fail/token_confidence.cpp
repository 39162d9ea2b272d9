// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/confidence_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::ConfidenceFault;

// A few cases that between them reach every line of the kernels; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  using C = ConfidenceCase;
  uint64_t seed = 1;
  for (const auto& [V, with, distribution] : {std::tuple{20003, C::kTies | 0u, 0},
                                              {16391, C::kSample | C::kShifted | 0u, 1},
                                              {3001, C::kSample | C::kTopP | C::kBanned | 0u, 2},
                                              {3001, C::kTopK | 0u, 2}}) {
    C c(dlm::DType::kBFloat16, 2, V, with, dlm::Distribution(distribution), ++seed);
    c.start<fault>();
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"confidence_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"confidence_maximum_read_too_early", attempt<Fault::kMaximumReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_parts_read_too_early", attempt<Fault::kPartsReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_lax_wait", attempt<Fault::kLaxWait>, "value", "value", "value", kNotRun},
    {"confidence_moves_too_early", attempt<Fault::kMovesTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_loads_one_off", attempt<Fault::kLoadsOneOff>, "simt", "ubsan", "simt", kNotRun},
    {"confidence_overread", attempt<Fault::kOverread>, "value", "asan", "value", kNotRun},
    {"confidence_unmasked_tail", attempt<Fault::kUnmaskedTail>, "value", "asan", "value", kNotRun},
    {"confidence_divergent_shuffle", attempt<Fault::kDivergentShuffle>, "simt", "simt", "simt", kNotRun},
    {"confidence_high_id_wins_ties", attempt<Fault::kHighIdWinsTies>, "value", "value", "value", kNotRun},
    {"confidence_maximum_stays", attempt<Fault::kMaximumStays>, "value", "value", "value", kNotRun},
    {"confidence_bound_too_high", attempt<Fault::kBoundTooHigh>, "value", "value", "value", kNotRun},
    {"confidence_wrong_tiles", attempt<Fault::kWrongTiles>, "value", "value", "value", kNotRun},
    {"confidence_bins_read_too_early", attempt<Fault::kBinsReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_limit_off_by_one", attempt<Fault::kLimitOffByOne>, "value", "value", "value", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
