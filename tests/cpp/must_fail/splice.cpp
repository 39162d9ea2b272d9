// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include "kernels/splice_case.h"
#include "mutants/splice.h"

namespace check {
namespace {

using Kernel = cudaError_t (*)(const dlm::SpliceParams&, cudaStream_t);

// A few cases that between them reach every line of the kernel; the first difference found, or "".
std::string attempt(Kernel start) {
  uint64_t seed = 1;
  for (const auto& [T, W] : {std::pair{900, 40}, {601, 300}, {1500, 200}}) {
    for (const unsigned with :
         {0x37u, 0x3fu & ~4u, 0x77u, 0x73u, 0x35u, 0xb7u, 0xb6u, 0xb6u, 0x36u}) {
      SpliceCase c(3, T, W, with, ++seed);
      start(c.p, nullptr);
      if (std::string wrong = c.wrong(); !wrong.empty()) return wrong;
    }
  }
  return "";
}

#define ROW(NAME, ...)                                                                           \
  {"splice_" #NAME, [] { return attempt(dlm::cuda::mutants::NAME::start_splice); }, __VA_ARGS__, \
   kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
