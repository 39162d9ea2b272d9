// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/remask_case.h"
#include "mutants/remask.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::RemaskParams&, cudaStream_t);

// A few cases that between them reach every line of the kernel; the first difference found, or "".
std::string attempt(Kernel start) {
  uint64_t seed = 1;
  for (const auto& [T, W] : {std::pair{33, 9}, {700, 70}, {600, 300}}) {
    for (const unsigned with : {0x1ffu, 0xffu, 0x7ffu, 0xc3u, 0x7bfu, 0xf1u, 0x8ffu, 0xfffu}) {
      RemaskCase c(3, T, W, with, ++seed);
      start(c.p, nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

#define ROW(NAME, ...)                                                                           \
  {"remask_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_remask); }, __VA_ARGS__, \
   kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
