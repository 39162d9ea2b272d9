// SPDX-License-Identifier: Apache-2.0
#include "cpu/remask_generic.cpp"
#include "cuda/remask.cuh"
#include "kernels/remask_case.h"

using namespace check;

namespace {

void check_case(int64_t B, int64_t T, int64_t W, unsigned with, uint64_t seed) {
  RemaskCase c(B, T, W, with, seed);
  run(dlm::cuda::start_remask(c.p, nullptr));
  CHECK(c.wrong().empty(), "arguments %x, seed %d: %s", with, int(seed), c.wrong().c_str());
}

}  // namespace

// Every set of masks and optional arguments; windows in order, in any order, and against the
// rules.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (unsigned with = 0; with < 4096; ++with) {
    if ((with & RemaskCase::kTwice) && !(with & RemaskCase::kUnordered)) continue;
    ++seed;
    check_case(2, seed % 2 ? 12 : 31, 5 + int64_t(seed % 12), with, seed);
  }
}

TEST(shapes) {
  uint64_t seed = 5000;
  for (const auto& [B, T, W] : {std::tuple{1, 0, 0},
                                {2, 0, 3},
                                {3, 1, 1},
                                {2, 5, 0},
                                {2, 513, 3},
                                {2, 1000, 129},
                                {1, 2500, 32},
                                {1, 2501, 600},
                                {1, 9000, 64},
                                {1, 2000, 1500},
                                {1, 40001, 32},
                                {1, 4500, 4096}}) {
    for (const unsigned with : {0x1u, 0xffu, 0x1ffu, 0x7ffu, 0xf7u, 0x8ffu, 0xff3u})
      check_case(B, T, W, with, ++seed);
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 7000;
    for (const auto& [T, W] : {std::pair{50, 20}, {601, 70}, {700, 200}}) {
      for (const unsigned with : {0xffu, 0x7ffu, 0xf1u, 0x8f3u}) check_case(3, T, W, with, ++seed);
    }
  });
}

// Rows that start at odd addresses are read position by position.
TEST(unaligned_views) {
  for (const unsigned with : {0xf3u, 0x3f3u, 0x8f3u}) {
    RemaskCase c(1, 64, 16, with, 9);
    Array<int64_t> tokens(66);
    Array<uint8_t> state(65);
    std::copy(c.got.tokens.begin(), c.got.tokens.end(), tokens.begin() + 1);
    std::copy(c.got.state.begin(), c.got.state.end(), state.begin() + 1);
    c.p.tokens = tokens.data() + 1, c.p.state = state.data() + 1;
    run(dlm::cuda::start_remask(c.p, nullptr));
    std::copy(tokens.begin() + 1, tokens.end() - 1, c.got.tokens.begin());
    std::copy(state.begin() + 1, state.end(), c.got.state.begin());
    CHECK(c.wrong().empty(), "%s", c.wrong().c_str());
  }
}

TEST(eos_ids_have_a_limit) {
  RemaskCase c(1, 8, 4, 0xf3, 1);
  c.p.eos_count = dlm::cuda::kMaxEosTokens + 1;
  CHECK(dlm::cuda::why_not_remask(c.p) != nullptr, "65 ids are too many");
}

#ifdef DLM_SIMT
TEST(search_is_coalesced) {
  RemaskCase c(1, 4096, 0, RemaskCase::kEos, 3);
  simt::counters() = {};
  run(dlm::cuda::start_remask(c.p, nullptr));
  const auto& n = simt::counters();
  CHECK(n.gmem_sectors == n.gmem_ideal_sectors && n.gmem_requests == 4096 / 2 / 32,
        "%zu sectors, ideal %zu", size_t(n.gmem_sectors), size_t(n.gmem_ideal_sectors));
}
#endif
