// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/confidence_case.h"
#include "mutants/token_confidence.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::TokenConfidenceParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernels; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = ConfidenceCase;
  uint64_t seed = 1;
  for (const auto& [V, with, distribution] :
       {std::tuple{20003, C::kTies | 0u, 0},
        {16391, C::kSample | C::kShifted | 0u, 1},
        {3001, C::kSample | C::kSpecial | C::kShifted | 0u, 0},
        {3001, C::kSample | C::kSpecial | 0u, 0},
        {3001, C::kTies | C::kBanned | 0u, 0},
        {3001, C::kSample | C::kTopP | C::kBanned | 0u, 2},
        {20003, C::kTwoValues | C::kTopP | 0u, 2},
        {3001, C::kTopK | 0u, 2},
        {5000, C::kSample | 0u, 0},
        {250, C::kSample | C::kTopK | 0u, 0},
        {250, C::kSample | C::kTopK | 0u, 1},
        {250, C::kSample | C::kTopK | 0u, 1}}) {
    C c(dlm::DType::kBFloat16, V < 256 ? 20 : V == 5000 ? 40 : V == 20003 ? 6 : 2, V, with, dlm::Distribution(distribution), ++seed);
    start(c.p, c.workspace.data(), nullptr);
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  return "";
}

#define ROW(NAME, ...)                                                                            \
  {"confidence_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_token_confidence); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
