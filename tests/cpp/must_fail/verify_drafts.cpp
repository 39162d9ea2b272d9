// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/verify_case.h"
#include "mutants/verify_drafts.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::VerifyDraftsParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernel; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = VerifyCase;
  uint64_t seed = 1;
  for (const auto& [W, V, with] : {std::tuple{3, 12001, C::kRatio | C::kLenient | 0u},
                                   {40, 90, C::kRatio | C::kAgree | 0u},
                                   {3, 1003, C::kRatio | C::kMaps | C::kHostile | C::kBanned | 0u},
                                   {2, 4000, C::kRatio | C::kFlat | C::kShifted | 0u}}) {
    for (int again = 0; again < 10; ++again) {
      C c(dlm::DType::kBFloat16, 3, W, V, with, ++seed);
      start(c.p, c.workspace.data(), nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

#define ROW(NAME, ...)                                                                     \
  {"verify_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_verify_drafts); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
