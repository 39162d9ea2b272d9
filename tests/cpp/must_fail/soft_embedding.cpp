// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/soft_case.h"
#include "mutants/soft_embedding.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::SoftEmbeddingParams&, void*, cudaStream_t);

// A few cases that between them reach every line of the kernels; the first difference found, or "".
std::string attempt(Kernel start) {
  using C = SoftCase;
  constexpr dlm::DType kHalf = dlm::DType::kBFloat16;
  uint64_t seed = 1;
  for (const auto& [N, V, D, with] : {std::tuple{5, 4103, 24, C::kTemperature | 0u},
                                      {17, 200, 136, C::kSpecial | 0u},
                                      {3, 77, 9, C::kUnaligned | C::kShifted | 0u},
                                      {2, 8300, 40, C::kFloor | C::kMask | 0u}}) {
    C c(kHalf, kHalf, N, V, D, with, ++seed);
    start(c.p, c.workspace.data(), nullptr);
    if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
  }
  return "";
}

#define ROW(NAME, ...)                                                                    \
  {"soft_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_soft_embedding); }, \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
