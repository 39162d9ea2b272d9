// SPDX-License-Identifier: Apache-2.0
#include "kernels/soft_case.h"

using namespace check;
using C = SoftCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kFloat32, dlm::DType::kBFloat16, dlm::DType::kFloat16};

void check_case(int dtype, int weight_dtype, int64_t N, int64_t V, int64_t D, unsigned with,
                uint64_t seed) {
  C c(kTypes[dtype], kTypes[weight_dtype], N, V, D, with, seed);
  run(c.start());
  CHECK(c.wrong().empty(), "types %d and %d, arguments %x, seed %d: %s", dtype, weight_dtype, with,
        int(seed), c.wrong().c_str());
}

}  // namespace

// Every set of arguments and every pair of types.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (unsigned with = 0; with < 256; ++with) {
    if ((with & C::kMask) && !(with & C::kFloor)) continue;
    if ((with & C::kHostile) && !(with & C::kMap)) continue;
    ++seed;
    check_case(int(seed % 3), int(seed / 3 % 3), 3, 50 + int64_t(seed % 40), 8, with, seed);
  }
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int weight_dtype = 0; weight_dtype < 3; ++weight_dtype) {
      for (const unsigned with : {C::kTemperature | 0u, C::kFloor | C::kMask | 0u})
        check_case(dtype, weight_dtype, 4, 300, 40, with, ++seed);
    }
  }
}

// Around a tile's rows, columns and ids, a chunk, a split.
TEST(every_edge) {
  uint64_t seed = 1000;
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (const int64_t N : {1, 15, 16, 17, 63, 64, 65}) check_case(1, dtype, N, 70, 16, 0, ++seed);
    for (const int64_t D : {1, 4, 8, 63, 64, 120, 127, 128, 129, 136, 260}) {
      check_case(1, dtype, 2, 40, D, 0, ++seed);
      check_case(0, dtype, 2, 40, D, C::kFloor, ++seed);
    }
    for (const int64_t V : {1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 4097})
      check_case(2, dtype, 2, V, 16, C::kTemperature, ++seed);
    for (const int64_t V : {1, 9, 2047, 2048, 2049, 8193})
      check_case(2, dtype, 2, V, 16, C::kFloor, ++seed);
    check_case(1, dtype, 1, 20, 1030, C::kFloor | C::kMask, ++seed);
  }
}

TEST(longer_splits) { check_case(1, 1, 1, 33001, 8, C::kTemperature, 1500); }

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 2000;
    check_case(1, 1, 17, 2200, 136, C::kTemperature, ++seed);
    check_case(0, 0, 3, 200, 40, C::kUnaligned, ++seed);
    check_case(1, 2, 2, 5000, 24, C::kFloor | C::kMask, ++seed);
  });
}

// What a row gives depends on the row alone.
TEST(rows_are_independent) {
  for (const unsigned with : {C::kTemperature | 0u, C::kTemperature | C::kFloor | C::kMask | 0u}) {
    C c(kTypes[1], kTypes[1], 70, 2300, 24, with, 3000);
    run(c.start());
    for (const int64_t n : {0, 15, 16, 63, 69}) {
      dlm::SoftEmbeddingParams p = c.p;
      p.N = p.R = 1, p.argmax += n, p.temperature = from_row(p.temperature, n);
      p.logits = static_cast<const uint16_t*>(p.logits) + n * p.logits_stride;
      if (p.floor) p.floor += n;
      Array<uint16_t> out(24);
      p.out = out.data();
      Array<uint8_t> workspace(size_t(dlm::cuda::soft_workspace_of(p)), 0xff);
      run(dlm::cuda::start_soft_embedding(p, workspace.data(), nullptr));
      CHECK(!memcmp(out.data(), c.out.data() + n * 24 * 2, 24 * 2), "row %d", int(n));
    }
  }
}

TEST(limits) {
  C c(kTypes[0], kTypes[0], 1, 3, 4, 0, 1);
  CHECK(dlm::cuda::why_not_soft_embedding(c.p) == nullptr, "a small case");
  c.p.D = 16385;
  CHECK(dlm::cuda::why_not_soft_embedding(c.p) == nullptr, "a wide table");
  c.p.N = int64_t(1) << 27;
  CHECK(dlm::cuda::why_not_soft_embedding(c.p) != nullptr, "more blocks than a grid has");
}

#ifdef DLM_SIMT
// Tiles lie in shared memory such that neither copies nor ldmatrix meet in a bank.
TEST(bank_conflicts) {
  for (const int dtype : {0, 1, 2}) {
    C c(kTypes[1], kTypes[dtype], 64, 256, 128, 0, 1);
    simt::counters() = {};
    run(c.start());
    const auto& n = simt::counters();
    CHECK(n.smem_conflicts == 0, "type %d: %zu conflicts", dtype, size_t(n.smem_conflicts));
  }
}
#endif
