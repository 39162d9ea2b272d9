// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/candidates_case.h"
#include "mutants/top_candidates.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::TopCandidatesParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernel; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = CandidatesCase;
  uint64_t seed = 1;
  for (const auto& [V, k, with] : {std::tuple{5000, 16, 0u},
                                   {20000, 64, C::kTies | 0u},
                                   {3000, 40, C::kRising | 0u},
                                   {700, 33, C::kSpecial | C::kMap | C::kBanned | C::kWild | 0u},
                                   {20000, 7, C::kCrowded | C::kShifted | 0u},
                                   {20000, 64, C::kCrowded | 0u}}) {
    for (int again = 0; again < 3; ++again) {
      C c(dlm::DType::kBFloat16, 3, V, k, with, ++seed);
      start(c.p, c.workspace.data(), nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

#define ROW(NAME, ...)                                                                          \
  {"candidates_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_top_candidates); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
