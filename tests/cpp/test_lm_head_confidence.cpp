// SPDX-License-Identifier: Apache-2.0
#include "kernels/head_case.h"
#include "kernels/shards.h"
#ifdef DLM_SIMT
#include "simt/fiber.h"
#endif

using namespace check;
using C = HeadCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kBFloat16, dlm::DType::kFloat16, dlm::DType::kFloat32};

// ThreadSanitizer is slow, and looks for what does not depend on the numbers.
bool skipped(uint64_t seed) {
#ifdef DLM_SIMT
  return simt::under_tsan() && seed % 4;
#else
  (void)seed;
  return false;
#endif
}

void check_case(dlm::DType dtype, int64_t N, int64_t V, int64_t D, unsigned with, int distribution,
                uint64_t seed) {
  if (skipped(seed)) return;
  C c(dtype, N, V, D, with, dlm::Distribution(distribution), seed);
  run(c.start());
  CHECK(c.wrong().empty(), "seed %d, D %d: %s", int(seed), int(D), c.wrong().c_str());
}

}  // namespace

// Around a chunk of the vocabulary and a slice of columns, from any address.
TEST(every_shape) {
  uint64_t seed = 0;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t V : {1, 2, 7, 8, 31, 255, 256, 257, 513}) {
      ++seed;
      check_case(dtype, 3, V, 24 + int64_t(seed % 3), C::kSample | 0u, int(seed % 3), seed);
    }
    for (const int64_t D : {0, 1, 2, 8, 31, 32, 63, 64, 65, 120, 128, 192, 200}) {
      for (const unsigned with : {0u, C::kStrided}) {
        ++seed;
        check_case(dtype, 2, 260, D, with, int(seed % 3), seed);
      }
    }
  }
}

// Around the sizes of tiles, and more rows than one has.
TEST(every_number_of_rows) {
  uint64_t seed = 1000;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t N : {1, 16, 17, 32, 33, 64, 65, 128, 129}) {
      ++seed;
      check_case(dtype, N, 300, 70, C::kSample | 0u, 0, seed);
      if (N < 70) check_case(dtype, N, 300, 70, C::kGuidance | 0u, 0, ++seed);
    }
  }
}

TEST(random_arguments) {
  Random random(7);
  for (uint64_t seed = 2000; seed < 2090; ++seed) {
    const unsigned with = random.word() & random.word() & 0xffff;
    const unsigned strided = random.below(3) ? 0u : C::kStrided;
    const int64_t N = 1 + random.below(20), V = 1 + random.below(900), D = random.below(100);
    check_case(kTypes[seed % 3], N, V, D, with | strided, int(random.below(3)), seed);
  }
}

TEST(filters) {
  uint64_t seed = 3000;
  for (const unsigned which : {C::kTopK | 0u, C::kTopP | 0u, C::kTopK | C::kTopP | 0u}) {
    for (const unsigned more : {0u, C::kSample | C::kTies | 0u, C::kSample | C::kSpecial | 0u,
                                C::kSample | C::kGuidance | C::kRowMap | 0u}) {
      for (int distribution = 0; distribution < 3; ++distribution) {
        ++seed;
        check_case(kTypes[seed / 3 % 3], 4, 300, 40, which | more, distribution, seed);
      }
    }
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    check_case(dlm::DType::kBFloat16, 3, 400, 200, C::kSample | 0u, 0, 4000);
    check_case(dlm::DType::kFloat32, 3, 400, 70, C::kSample | C::kStrided, 0, 4004);
    check_case(dlm::DType::kFloat16, 2, 400, 70, C::kSample | C::kTopP | C::kGuidance, 2, 4008);
  });
}

// A row has the same bits in every group and tile, and wherever it lies in memory.
TEST(rows_are_independent) {
  for (const dlm::DType dtype : kTypes) {
    for (const unsigned with :
         {C::kSample | 0u, C::kSample | C::kGuidance | 0u, C::kSample | C::kTopP | C::kStrided}) {
      if (skipped(uint64_t(with == (C::kSample | 0u) ? 0 : 1))) continue;
      const int64_t N = 70;
      C c(dtype, N, 300, 150, with | C::kReal, dlm::Distribution::kTempered, 5000);
      run(c.start());
      const int64_t size = dlm::element_size(dtype);
      for (const int64_t n : {0, 15, 16, 63, 69}) {
        dlm::LmHeadConfidenceParams head = c.head;
        dlm::TokenConfidenceParams& p = head.rows;
        const auto* row = static_cast<const uint8_t*>(head.hidden) + n * head.hidden_stride * size;
        Array<uint8_t> moved(size_t((n + head.D) * size));
        std::copy(row, row + head.D * size, moved.begin() + n * size);
        head.hidden = moved.data() + n * size;
        if (head.uncond_hidden) {
          head.uncond_hidden =
              static_cast<const uint8_t*>(head.uncond_hidden) + n * head.uncond_stride * size;
        }
        p.N = p.R = 1, p.given += n;
        p.temperature = from_row(p.temperature, n), p.top_p = from_row(p.top_p, n);
        p.cfg_scale = from_row(p.cfg_scale, n);
        p.random.seed = from_row(p.random.seed, n), p.random.step = from_row(p.random.step, n);
        p.random.redraw = from_row(p.random.redraw, n);
        p.random.position += n;
        Array<int64_t> token(1), argmax(1);
        Array<float> floats(5);
        Array<int32_t> flags(1);
        p.token = token.data(), p.argmax = argmax.data(), p.flags = flags.data();
        p.confidence = &floats[0], p.logsumexp = &floats[1], p.p_given = &floats[2];
        p.margin = &floats[3], p.entropy = &floats[4], p.floor = nullptr;
        Array<uint8_t> workspace(size_t(dlm::cuda::head_workspace(head)), 0xff);
        run(dlm::cuda::start_lm_head_confidence(head, workspace.data(), nullptr));
        bool same = token[0] == c.token[size_t(n)] && argmax[0] == c.argmax[size_t(n)];
        for (int64_t k = 0; k < 5; ++k)
          same &= !memcmp(&floats[size_t(k)], &c.statistics[size_t(k * N + n)], sizeof(float));
        CHECK(same, "row %d, type %d, with %x", int(n), int(dtype), with);
      }
    }
  }
}

// Shards of the weights say together what all weights say, with the same bits in any cut.
TEST(shards) {
  uint64_t seed = 7000;
  for (const dlm::DType dtype : kTypes) {
    for (const unsigned with : {C::kSample | 0u, C::kSample | C::kGuidance | C::kRowMap | 0u,
                                C::kSample | C::kBias | C::kBanned | C::kBitmask | 0u,
                                C::kTies | C::kStrided, C::kSample | C::kSpecial | C::kWild | 0u}) {
      if (skipped(++seed)) continue;
      C c(dtype, 4, 2100, 40, with, dlm::Distribution(seed % 3), seed);
      const std::string wrong = wrong_in_shards(c, [&](int64_t first, int64_t end, int64_t* words) {
        dlm::LmHeadConfidenceParams head = c.head;
        // Rows [first, end) of the weights, as columns of one row.
        const int64_t stride = head.weight_stride;
        const Columns weight(head.weight, 1, 0, first * stride, (end - 1) * stride + head.D,
                             dlm::element_size(dtype), with & C::kStrided ? 3 : 0);
        head.weight = weight.begin();
        const ShardOf own(c, first, end, head.rows);
        head.rows.partial = words;
        Array<uint8_t> workspace(size_t(dlm::cuda::head_workspace(head)), 0xff);
        run(dlm::cuda::start_lm_head_confidence(head, workspace.data(), nullptr));
      });
      CHECK(wrong.empty(), "seed %d: %s", int(seed), wrong.c_str());
    }
  }
}

// 8 MB, however many rows; and as few groups as that allows.
TEST(workspace) {
  dlm::LmHeadConfidenceParams head{};
  dlm::TokenConfidenceParams& p = head.rows;
  p.dtype = dlm::DType::kBFloat16, p.V = 262144, head.D = 4096;
  const auto bytes = [&](int64_t rows) {
    p.N = p.R = rows;
    return dlm::cuda::head_workspace(head);
  };
  for (const int64_t rows : {1, 8, 32, 128, 129, 250, 256, 300, 512, 10000}) {
    CHECK(bytes(rows) <= 8'000'000, "%d rows: %lld bytes", int(rows), (long long)bytes(rows));
  }
  CHECK(bytes(0) == 0, "of nothing");
  p.N = 10000;
  CHECK(dlm::cuda::head_group(head) == 256, "%d rows", int(dlm::cuda::head_group(head)));
  p.N = 129;
  CHECK(dlm::cuda::head_group(head) == 129, "%d rows", int(dlm::cuda::head_group(head)));
  const float one = 1;
  p.top_p = {&one, 1}, p.distribution = dlm::Distribution::kFiltered;
  for (const int64_t rows : {1, 32, 10000})
    CHECK(bytes(rows) <= 8'000'000, "%d rows: %lld bytes", int(rows), (long long)bytes(rows));
  CHECK(dlm::cuda::head_group(head) == 14, "%d rows", int(dlm::cuda::head_group(head)));
}

// Several groups, of rows that share values: 8 MB hold the logits of 15 such rows.
TEST(groups) {
  const float one = 1;
  dlm::LmHeadConfidenceParams head{};
  head.rows.dtype = dlm::DType::kBFloat16, head.rows.N = head.rows.R = 16, head.rows.V = 120000;
  head.rows.top_p = {&one, 1}, head.rows.distribution = dlm::Distribution::kFiltered;
  head.D = 8, head.uncond_hidden = &one;
  CHECK(dlm::cuda::head_group(head) == 8, "%d rows", int(dlm::cuda::head_group(head)));
  check_case(dlm::DType::kBFloat16, 16, 120000, 8, C::kSample | C::kTopK | C::kGuidance, 2, 6001);
}

#ifdef DLM_SIMT
// The weights are read once, in whole sectors, and no two lanes meet in a bank.
TEST(memory_traffic) {
  for (const int64_t N : {16, 64, 128}) {
    C c(dlm::DType::kBFloat16, N, 512, 256, 0, dlm::Distribution::kRaw, 1);
    simt::counters() = {};
    run(c.start());
    const auto& counts = simt::counters();
    CHECK(counts.smem_conflicts == 0, "%d rows: %llu conflicts", int(N),
          (unsigned long long)counts.smem_conflicts);
    // Sectors of weights, and of hidden states for each of the two chunks.
    const uint64_t ideal = uint64_t(512 + 2 * N) * 256 * 2 / 32;
    CHECK(counts.gmem_sectors == ideal, "%d rows: %llu sectors, ideal %llu", int(N),
          (unsigned long long)counts.gmem_sectors, (unsigned long long)ideal);
  }
}
#endif
