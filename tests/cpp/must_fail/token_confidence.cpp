// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/confidence_case.h"
#include "kernels/shards.h"
#include "mutants/token_confidence.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::TokenConfidenceParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernels; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = ConfidenceCase;
  uint64_t seed = 1;
  for (const auto& [N, V, with, distribution] :
       {std::tuple{4, 2600, C::kTies | 0u, 0},
        {2, 2600, C::kSample | C::kShifted | 0u, 1},
        {4, 2600, C::kSample | C::kSpecial | 0u, 0},
        {6, 2048, C::kTies | C::kBanned | 0u, 0},
        {2, 2600, C::kSample | C::kTopP | C::kBanned | 0u, 2},
        {1, 20003, C::kTwoValues | C::kTopP | 0u, 2},
        {2, 2600, C::kTopK | 0u, 2},
        {8, 1500, C::kSample | 0u, 0},
        {8, 1500, C::kSample | 0u, 0},
        {8, 1500, C::kSample | 0u, 0},
        {20, 250, C::kSample | C::kTopK | 0u, 0},
        {20, 250, C::kSample | C::kTopK | 0u, 1}}) {
    C c(dlm::DType::kBFloat16, N, V, with, dlm::Distribution(distribution), ++seed);
    start(c.p, c.workspace.data(), nullptr);
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  C c(dlm::DType::kBFloat16, 4, 1500, C::kSample | C::kRowMap | 0u, dlm::Distribution::kRaw,
      ++seed);
  return wrong_in_shards(c, [&](int64_t first, int64_t end, int64_t* words) {
    dlm::TokenConfidenceParams p = c.p;  // whose pointers are those of the whole vocabulary
    p.first = first, p.V = end, p.partial = words;
    start(p, c.workspace.data(), nullptr);
  });
}

#define ROW(NAME, ...)                                                                             \
  {"confidence_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_as<dlm::BFloat16>); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
