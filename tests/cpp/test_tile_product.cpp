// SPDX-License-Identifier: Apache-2.0
#include "kernels/carriers.h"

using namespace check;

TEST(matches_reference) {
  for_each_schedule([] {
    for (auto [M, N, K] : {std::tuple{1, 4, 8}, {32, 16, 32}, {33, 20, 72}, {70, 36, 104}}) {
      TileCase c(M, N, K, uint64_t(M));
      run(dlm::cuda::tile_product(c.params(), nullptr));
      CHECK(c.wrong().empty(), "%d x %d x %d: %s", M, N, K, c.wrong().c_str());
    }
  });
}

#ifdef DLM_SIMT
TEST(swizzle_avoids_bank_conflicts) {
  const auto conflicts = [](auto product) {
    TileCase c(32, 16, 64, 1);
    simt::counters() = {};
    run(product(c.params(), nullptr));
    CHECK(c.wrong().empty(), "%s", c.wrong().c_str());
    CHECK(simt::counters().ldmatrix == 2 * 2 * 4 && simt::counters().mma == 2 * 2 * 4,
          "%zu ldmatrix, %zu mma", size_t(simt::counters().ldmatrix), size_t(simt::counters().mma));
    return simt::counters().smem_conflicts;
  };
  using namespace dlm::cuda;
  const auto swizzled = conflicts(tile_product<TileFault::kNone>);
  const auto straight = conflicts(tile_product<TileFault::kNoSwizzle>);
  CHECK(swizzled == 0, "%zu conflicts", size_t(swizzled));
  CHECK(straight > 0, "the counter sees no conflict without the swizzle");
}
#endif
