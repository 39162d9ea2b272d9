// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/verify_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::VerifyFault;

// A few cases that between them reach every line of the kernel; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  using C = VerifyCase;
  uint64_t seed = 1;
  for (const auto& [W, V, with] : {std::tuple{3, 5001, C::kRatio | C::kLenient | 0u},
                                   {40, 90, C::kRatio | C::kAgree | 0u},
                                   {3, 1003, C::kRatio | C::kMaps | C::kHostile | C::kBanned | 0u},
                                   {2, 4000, C::kRatio | C::kFlat | C::kShifted | 0u}}) {
    for (int again = 0; again < 3; ++again) {
      C c(dlm::DType::kBFloat16, 3, W, V, with, ++seed);
      dlm::cuda::start_verify_drafts<fault>(c.p, nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"verify_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"verify_accepted_read_too_early", attempt<Fault::kAcceptedReadTooEarly>, "crash", "asan", "crash", kNotRun},
    {"verify_best_read_too_early", attempt<Fault::kBestReadTooEarly>, "value", "value", "race", kNotRun},
    {"verify_counts_beyond_failure", attempt<Fault::kCountsBeyondFailure>, "value", "value", "value", kNotRun},
    {"verify_no_leniency", attempt<Fault::kNoLeniency>, "value", "value", "value", kNotRun},
    {"verify_bound_too_low", attempt<Fault::kBoundTooLow>, "value", "value", "value", kNotRun},
    {"verify_trusts_drafts", attempt<Fault::kTrustsDrafts>, "crash", "asan", "crash", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
