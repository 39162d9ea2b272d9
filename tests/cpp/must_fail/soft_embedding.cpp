// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/soft_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::SoftFault;

// A few cases that between them reach every line of the kernels; the first difference found, or "".
template <Fault fault>
std::string attempt() {
  using C = SoftCase;
  constexpr dlm::DType kHalf = dlm::DType::kBFloat16;
  uint64_t seed = 1;
  for (const auto& [N, V, D, with] : {std::tuple{5, 4103, 24, C::kTemperature | 0u},
                                      {66, 200, 136, C::kSpecial | 0u},
                                      {3, 77, 9, C::kUnaligned | C::kShifted | 0u},
                                      {3, 5000, 40, C::kFloor | C::kMask | 0u}}) {
    C c(kHalf, kHalf, N, V, D, with, ++seed);
    c.start<fault>();
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"soft_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"soft_lax_wait", attempt<Fault::kLaxWait>, "value", "value", "value", kNotRun},
    {"soft_no_barrier", attempt<Fault::kNoBarrier>, "value", "value", "race", kNotRun},
    {"soft_overread", attempt<Fault::kOverread>, "?", "asan", "?", kNotRun},
    {"soft_unmasked_tail", attempt<Fault::kUnmaskedTail>, "value", "value", "value", kNotRun},
    {"soft_splits_overlap", attempt<Fault::kSplitsOverlap>, "value", "value", "value", kNotRun},
    {"soft_sums_once", attempt<Fault::kSumsOnce>, "value", "value", "value", kNotRun},
    {"soft_swapped_registers", attempt<Fault::kSwappedRegisters>, "value", "value", "value", kNotRun},
    {"soft_hits_read_too_early", attempt<Fault::kHitsReadTooEarly>, "value|crash", "asan", "race", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
