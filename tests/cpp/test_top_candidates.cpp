// SPDX-License-Identifier: Apache-2.0
#include "kernels/candidates_case.h"

using namespace check;
using C = CandidatesCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kFloat32, dlm::DType::kBFloat16, dlm::DType::kFloat16};

void check_case(dlm::DType dtype, int64_t N, int64_t V, int64_t k, unsigned with, uint64_t seed) {
  C c(dtype, N, V, k, with, seed);
  run(c.start());
  CHECK(c.wrong().empty(), "dtype %d, V %d, k %d, arguments %x, seed %d: %s", int(dtype), int(V),
        int(k), with, int(seed), c.wrong().c_str());
}

}  // namespace

// Every set of arguments.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (unsigned with = 0; with < 512; ++with) {
    if ((with & C::kWild) && !(with & C::kMap)) continue;
    if ((with & C::kTies) && (with & C::kRising)) continue;
    ++seed;
    const int64_t k[] = {1, 3, 16, 64};
    check_case(kTypes[seed % 3], 4, 300 + int64_t(seed % 37), k[seed % 4], with, seed);
  }
}

// Around a lane's run, a chunk, a warp's and a block's chunks; fewer chunks than candidates and
// more.
TEST(every_edge) {
  uint64_t seed = 1000;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t V : {1, 2, 7, 63, 64, 65, 255, 256, 257, 1025, 2049, 16384, 16640, 17000}) {
      for (const int64_t k : {1, 31, 32, 33, 63, 64}) check_case(dtype, 2, V, k, 0, ++seed);
    }
  }
}

// The bound is reached by more logits than are asked for, or by one chunk's alone.
TEST(many_at_the_bound) {
  uint64_t seed = 2000;
  for (const dlm::DType dtype : kTypes) {
    for (const unsigned with :
         {C::kTies | 0u, C::kRising | 0u, C::kCrowded | 0u, C::kCrowded | C::kTies | 0u}) {
      for (const int64_t k : {1, 16, 64}) check_case(dtype, 2, 24000, k, with, ++seed);
    }
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 3000;
    check_case(kTypes[1], 3, 5000, 16, C::kBanned | C::kBitmask, ++seed);
    check_case(kTypes[0], 2, 3000, 64, C::kTies | C::kMap, ++seed);
  });
}

// What a row gives depends on the row alone.
TEST(rows_are_independent) {
  C c(kTypes[1], 6, 5000, 9, C::kShifted, 4000);
  run(c.start());
  for (const int64_t n : {0, 3, 5}) {
    dlm::TopCandidatesParams p = c.p;
    p.rows.N = p.rows.R = 1;
    p.rows.logits = static_cast<const uint16_t*>(p.rows.logits) + n * p.rows.logits_stride;
    Array<int64_t> ids(9);
    Array<float> values(9), logsumexp(1);
    p.ids = ids.data(), p.values = values.data(), p.logsumexp = logsumexp.data();
    Array<uint8_t> workspace(size_t(dlm::cuda::workspace_of(p.rows)), 0xff);
    run(dlm::cuda::start_top_candidates(p, workspace.data(), nullptr));
    CHECK(!memcmp(ids.data(), c.ids.data() + n * 9, 9 * 8), "ids of row %d", int(n));
    CHECK(!memcmp(values.data(), c.values.data() + n * 9, 9 * 4), "values of row %d", int(n));
    CHECK(!memcmp(&logsumexp[0], &c.logsumexp[size_t(n)], 4), "logsumexp of row %d", int(n));
  }
}
