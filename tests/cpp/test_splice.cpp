// SPDX-License-Identifier: Apache-2.0
#include "cpu/splice_generic.cpp"
#include "cuda/splice.cuh"
#include "kernels/splice_case.h"

using namespace check;
using C = SpliceCase;

namespace {

void check_case(int64_t B, int64_t T, int64_t W, unsigned with, uint64_t seed) {
  C c(B, T, W, with, seed);
  run(dlm::cuda::start_splice(c.p, nullptr));
  CHECK(c.wrong().empty(), "arguments %x, seed %d: %s", with, int(seed), c.wrong().c_str());
}

}  // namespace

// Every set of arguments, each a few times.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (unsigned with = 0; with < 256; ++with) {
    if ((with & C::kLength) && (with & C::kEnd)) continue;
    for (const int64_t T : {1, 12, 31, 40}) {
      ++seed;
      check_case(3, T, 1 + int64_t(seed % 20), with, seed);
    }
  }
}

TEST(shapes) {
  uint64_t seed = 5000;
  for (const auto& [B, T, W] : {std::tuple{1, 0, 0},
                                {2, 0, 3},
                                {3, 1, 1},
                                {2, 5, 0},
                                {2, 255, 256},
                                {2, 256, 257},
                                {2, 257, 30},
                                {2, 3000, 256},
                                {2, 3000, 1024},
                                {1, 5000, 4096},
                                {1, 20001, 32}}) {
    for (const unsigned with : {0x37u, 0x3bu, 0x73u, 0x77u, 0x32u, 0x35u})
      check_case(B, T, W, with, ++seed);
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 7000;
    for (const auto& [T, W] : {std::pair{50, 20}, {900, 70}, {1400, 300}}) {
      for (const unsigned with : {0x37u, 0x36u, 0x73u, 0x77u}) check_case(3, T, W, with, ++seed);
    }
  });
}

// Sums of counts that leave 32 bits.
TEST(largest_counts) {
  for (const bool grows : {false, true}) {
    C c(1, 600, 300, C::kInsert | C::kState | (grows ? C::kLength | 0u : 0u), 3);
    c.start[0] = 5;
    for (auto& count : c.insert) count = INT32_MAX;
    Array<int64_t> before(600);
    std::copy(c.got.tokens.begin(), c.got.tokens.end(), before.begin());
    run(dlm::cuda::start_splice(c.p, nullptr));
    CHECK(c.got.info[dlm::kSpliceOverflow] == INT32_MAX, "overflow %d", c.got.info[2]);
    CHECK(c.got.tokens[4] == before[4] && c.got.tokens[5] == (grows ? before[5] : 1000) &&
              c.got.tokens[599] == (grows ? before[599] : 1000),
          "tokens %d", int(c.got.tokens[5]));
  }
}
