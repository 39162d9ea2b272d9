// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/head_case.h"
#include "kernels/shards.h"
#include "mutants/lm_head_confidence.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::LmHeadConfidenceParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernels; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = HeadCase;
  uint64_t seed = 1;
  for (const auto& [N, V, D, with, distribution] :
       {std::tuple{3, 600, 200, 0u, 0},
        {20, 300, 70, C::kSample | C::kStrided, 1},
        {4, 300, 40, C::kTies | C::kBanned | 0u, 0},
        {5, 520, 40, C::kSample | C::kGuidance | C::kRowMap | 0u, 0},
        {9, 300, 20, C::kSample | C::kTopK | C::kGuidance | C::kRowMap | 0u, 2},
        {9, 800, 24, C::kSample | C::kBitmask | C::kSpecial | 0u, 0},
        {70, 270, 24, C::kSample | 0u, 1},
        {130, 40, 8, 0u, 0}}) {
    C c(dlm::DType::kBFloat16, N, V, D, with, dlm::Distribution(distribution), ++seed);
    start(c.head, c.workspace.data(), nullptr);
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  C c(dlm::DType::kBFloat16, 3, 900, 24, C::kSample | 0u, dlm::Distribution::kRaw, ++seed);
  return wrong_in_shards(c, [&](int64_t first, int64_t end, int64_t* words) {
    dlm::LmHeadConfidenceParams head = c.head;  // whose pointers are those of the whole vocabulary
    head.rows.first = first, head.rows.V = end, head.rows.partial = words;
    start(head, c.workspace.data(), nullptr);
  });
}

#define ROW(NAME, ...)                                                                         \
  {"head_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_head<dlm::BFloat16>); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
