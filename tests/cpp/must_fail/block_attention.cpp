// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include <tuple>

#include "kernels/attention_case.h"
#include "mutants/block_attention.h"

namespace check {
namespace {

using dlm::cuda::AttendForm;
using Start = cudaError_t (*)(const dlm::BlockAttentionParams&, AttendForm, bool in_turn, float*);
// Of one head dimension: all kernels with all faults would take a compiler minutes.
struct Kernels {
  Start bf16, fp32;
};

template <class T>
std::string attempt_as(Start start, const AttentionShape& shape, AttendForm form, bool in_turn,
                       uint64_t seed) {
  AttentionCase<T> c(shape, seed);
  run(start(c.p, form, in_turn, c.workspace.data()));
  return c.wrong();
}

// A few cases that between them reach every fault; the first difference found, or "".
std::string attempt(const Kernels& kernels) {
  using Shape = AttentionShape;
  constexpr AttendForm kNarrow = AttendForm::kNarrow, kWide = AttendForm::kWide;
  const std::tuple<Shape, AttendForm, bool> cases[] = {  // and whether a block runs all splits
      {{.B = 1, .Q = 5, .S = 330, .H = 2, .G = 1, .mode = Shape::kRanges}, kNarrow, false},
      {{.B = 1, .Q = 40, .S = 90, .H = 1, .G = 1, .mode = Shape::kCausal, .infinite = true},
       kNarrow,
       false},
      {{.B = 1, .Q = 40, .S = 90, .H = 1, .G = 1, .mode = Shape::kCausal, .infinite = true},
       kWide,
       false},
      {{.B = 1, .Q = 90, .S = 150, .H = 1, .G = 1}, kWide, false},
      {{.B = 1, .Q = 40, .S = 50, .H = 1, .G = 1, .twice = true}, kNarrow, false},
      {{.B = 2, .Q = 40, .S = 90, .H = 2, .G = 1, .infinite = true, .shift = 7, .K = 50, .hides = true},
       kNarrow,
       false},
      {{.B = 1, .Q = 90, .S = 150, .H = 1, .G = 1, .infinite = true, .shift = 7, .K = 70, .hides = true},
       kWide,
       false},
      {{.B = 1, .Q = 1, .S = 1030, .H = 1, .G = 1}, kNarrow, false},
      {{.B = 1, .Q = 1, .S = 600, .H = 1, .G = 1}, kNarrow, true},
      {{.B = 1, .Q = 513, .S = 520, .H = 1, .G = 1, .D = 8, .mode = Shape::kWindow, .twice = true},
       kNarrow,
       true},
  };
  uint64_t seed = 900;
  for (const auto& [shape, form, in_turn] : cases) {
    const std::string wrong = attempt_as<dlm::BFloat16>(kernels.bf16, shape, form, in_turn, ++seed);
    if (!wrong.empty()) return wrong;
  }
  const Shape fp32{.B = 1,
                   .Q = 9,
                   .S = 300,
                   .H = 1,
                   .G = 1,
                   .D = 32,
                   .mode = Shape::kCausal,
                   .infinite = true,
                   .hides = true};
  return attempt_as<float>(kernels.fp32, fp32, kNarrow, false, ++seed);
}

#define START(NAME, T, D)                                                                      \
  [](const dlm::BlockAttentionParams& op, AttendForm form, bool in_turn, float* workspace) {   \
    namespace m = dlm::cuda::mutants::NAME;                                                    \
    m::AttendParams p = m::attend_params(op, m::AttendForm(form), workspace);                  \
    p.spread = p.spread && !in_turn;                                                           \
    const cudaError_t error = m::start_scatter(p, workspace, nullptr);                         \
    return error == cudaSuccess ? m::start_attend<T, D>(p, nullptr) : error;                   \
  }
#define ROW(NAME, ...)                                                                           \
  {"attention_" #NAME,                                                                           \
   [] { return attempt({START(NAME, dlm::BFloat16, 64), START(NAME, float, 32)}); },             \
   __VA_ARGS__, kNotRun},
const FaultTable kFaults({MUTANTS(ROW)});

}  // namespace

TEST(planted_faults_are_noticed) { kFaults.check(); }

}  // namespace check
