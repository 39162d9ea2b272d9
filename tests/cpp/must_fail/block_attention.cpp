// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/attention_case.h"

namespace check {
namespace {

using Fault = dlm::cuda::AttentionFault;

// A few cases that between them reach every fault; the first difference found, or "". Of one
// element type and head dimension: all kernels with all faults would take a compiler minutes.
template <Fault fault>
std::string attempt() {
  using namespace dlm::cuda;
  using Shape = AttentionShape;
  const Shape shapes[] = {
      {.B = 1, .Q = 5, .S = 330, .H = 2, .G = 1, .mode = Shape::kRanges},
      {.B = 1, .Q = 40, .S = 140, .H = 1, .G = 1, .mode = Shape::kCausal, .infinite = true},
      {.B = 1, .Q = 40, .S = 50, .H = 1, .G = 1, .twice = true},
      {.B = 1, .Q = 1, .S = 1030, .H = 1, .G = 1},
  };
  uint64_t seed = 900;
  for (const Shape& shape : shapes) {
    AttentionCase<dlm::BFloat16> c(shape, ++seed);
    const AttendParams p = attend_params(c.p, c.workspace.data());
    run(start_scatter<fault>(c.p, nullptr));
    run(start_attend<dlm::BFloat16, 64, fault>(p, nullptr));
    if (p.splits > 1) run(start_combine<dlm::BFloat16>(p, nullptr));
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  return "";
}

const FaultTable kFaults({
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"attention_none", attempt<Fault::kNone>, "-", "-", "-", ""},
    {"attention_no_barrier_before_reuse", attempt<Fault::kNoBarrierBeforeReuse>, "value", "value", "race", kNotRun},
    {"attention_lax_wait", attempt<Fault::kLaxWait>, "value", "value", "value", kNotRun},
    {"attention_tail_unmasked", attempt<Fault::kTailUnmasked>, "value", "value", "value", kNotRun},
    {"attention_splits_overlap", attempt<Fault::kSplitsOverlap>, "value", "value", "value", kNotRun},
    {"attention_not_rescaled", attempt<Fault::kNotRescaled>, "value", "value", "value", kNotRun},
    {"attention_zero_times_nan", attempt<Fault::kZeroTimesNaN>, "value", "value", "value", kNotRun},
    {"attention_merged_too_early", attempt<Fault::kMergedTooEarly>, "value", "value", "race", kNotRun},
    {"attention_maxima_mixed", attempt<Fault::kMaximaMixed>, "value", "value", "value", kNotRun},
    {"attention_first_row_wins", attempt<Fault::kFirstRowWins>, "value", "value", "value", kNotRun},
    // clang-format on
});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
