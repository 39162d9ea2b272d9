// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/select_case.h"
#include "mutants/select_tokens.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::SelectTokensParams&, cudaStream_t);

// A few cases that between them reach every line of the kernel; the first difference found, or "".
std::string attempt(Kernel start) {
  uint64_t seed = 1;
  for (const int64_t W : {5, 90, 200, 400}) {
    for (int rule = 0; rule < 7; ++rule) {
      for (const unsigned with :
           {SelectCase::kFill | SelectCase::kNeed, SelectCase::kCap | SelectCase::kGate | 0u,
            SelectCase::kGate | SelectCase::kFill | SelectCase::kNeed | 0u}) {
        SelectCase c(3, W, dlm::Rule(rule), with, ++seed);
        start(c.p, nullptr);
        if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

#define ROW(NAME, ...)                                                                     \
  {"select_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_select_tokens); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
