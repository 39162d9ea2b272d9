// SPDX-License-Identifier: Apache-2.0
#include "cpu/select_tokens_generic.cpp"
#include "cuda/select_tokens.cuh"
#include "kernels/select_case.h"

using namespace check;

namespace {

void check_case(int64_t B, int64_t W, int rule, unsigned with, uint64_t seed) {
  SelectCase c(B, W, dlm::Rule(rule), with, seed);
  run(dlm::cuda::start_select_tokens(c.p, nullptr));
  CHECK(c.wrong().empty(), "arguments %u, seed %d: %s", with, int(seed), c.wrong().c_str());
}

}  // namespace

// Every rule with every set of optional arguments, at the edges of a warp.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (int rule = 0; rule < 7; ++rule) {
    for (unsigned with = 0; with < 128; ++with) {
      for (const int64_t W : {1, 31, 32}) check_case(3, W, rule, with, ++seed);
    }
  }
}

TEST(every_block_size) {
  uint64_t seed = 1000;
  for (const int64_t W : {0, 33, 64, 65, 128, 200, 256, 257, 500, 512, 513, 1024}) {
    for (int rule = 0; rule < 7; ++rule) {
      for (const unsigned with : {6u, 15u, 86u}) check_case(2, W, rule, with, ++seed);
    }
  }
}

TEST(largest_windows) {
  uint64_t seed = 2000;
  for (const int64_t W : {2000, 4095, 4096}) {
    for (const auto& [rule, with] :
         {std::pair{0, 70u}, {2, 66u}, {3, 64u}, {4, 1u}, {5, 16u}, {6, 79u}}) {
      check_case(1, W, rule, with, ++seed);
    }
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 3000;
    for (const int64_t W : {20, 90, 300}) {
      for (int rule = 0; rule < 7; ++rule) check_case(3, W, rule, W == 90 ? 7 : 14, ++seed);
    }
  });
}

// Sums that leave 64 bits behind the first excess.
TEST(largest_costs) {
  for (const dlm::Rule rule : {dlm::Rule::kEntropyBound, dlm::Rule::kEntropySum}) {
    SelectCase c(1, 4096, rule, SelectCase::kWide, 5);
    for (auto& cost : c.cost) cost = 1e30f;
    c.parameter[0] = 1e30f;
    c.p.selected = reinterpret_cast<bool*>(c.expected.data()), c.p.count = c.expected_count.data();
    dlm::cpu::generic::select_tokens(c.p, 0, 1);
    c.p.selected = reinterpret_cast<bool*>(c.selected.data()), c.p.count = c.count.data();
    run(dlm::cuda::start_select_tokens(c.p, nullptr));
    CHECK(c.wrong().empty() && c.count[0] == (rule == dlm::Rule::kEntropyBound ? 2 : 0),
          "count %d; %s", c.count[0], c.wrong().c_str());
  }
}
