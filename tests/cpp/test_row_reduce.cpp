// SPDX-License-Identifier: Apache-2.0
#include "kernels/carriers.h"

using namespace check;

TEST(matches_reference) {
  for_each_schedule([] {
    for (auto [rows, columns, splits] :
         {std::tuple{1, 1, 1}, {2, 7, 2}, {3, 512, 1}, {2, 1003, 3}, {1, 4099, 5}}) {
      RowCase c(rows, columns, splits, uint64_t(columns));
      run(dlm::cuda::row_reduce(c.params(), c.rows, nullptr));
      CHECK(c.wrong().empty(), "%d x %d, %d splits: %s", rows, columns, splits, c.wrong().c_str());
    }
  });
}

// The sum is taken in an order that depends on the shape alone.
TEST(same_bits_under_every_schedule) {
  uint32_t first = 0;
  for_each_schedule([&] {
    RowCase c(1, 1003, 3, 5);
    run(dlm::cuda::row_reduce(c.params(), c.rows, nullptr));
    const uint32_t bits = dlm::float_to_bits(c.out[0].sum);
    if (!first) first = bits;
    CHECK(bits == first, "sum %08x, at first %08x", bits, first);
  });
}

#ifdef DLM_SIMT
TEST(loads_are_coalesced) {
  RowCase c(2, 4096, 1, 3);
  simt::counters() = {};
  run(dlm::cuda::row_reduce(c.params(), c.rows, nullptr));
  const auto& n = simt::counters();
  CHECK(n.gmem_sectors == n.gmem_ideal_sectors && n.gmem_requests == 2 * 4096 / 8 / 32,
        "%zu sectors, ideal %zu", size_t(n.gmem_sectors), size_t(n.gmem_ideal_sectors));
}
#endif
