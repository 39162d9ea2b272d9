// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.cpp"
#include "cpu/shard_confidence.cpp"
#include "cpu/shard_confidence_generic.cpp"
#include "cpu/token_confidence.cpp"
#include "cpu/token_confidence_generic.cpp"
#include "kernels/confidence_case.h"
#include "kernels/shards.h"
#ifdef DLM_SIMT
#include "simt/fiber.h"
#endif

using namespace check;
using C = ConfidenceCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kFloat32, dlm::DType::kBFloat16, dlm::DType::kFloat16};

// ThreadSanitizer is slow, and looks for what does not depend on the numbers.
bool skipped(uint64_t seed) {
#ifdef DLM_SIMT
  return simt::under_tsan() && seed % 4;
#else
  (void)seed;
  return false;
#endif
}

void check_case(dlm::DType dtype, int64_t N, int64_t V, unsigned with, int distribution,
                uint64_t seed) {
  if (skipped(seed)) return;
  C c(dtype, N, V, with, dlm::Distribution(distribution), seed);
  run(c.start());
  CHECK(c.wrong().empty(), "seed %d: %s", int(seed), c.wrong().c_str());
}

}  // namespace

// Around a chunk, a warp's chunks, a tile; rows that start anywhere.
TEST(every_width) {
  uint64_t seed = 0;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t V : {1, 2, 7, 8, 9, 31, 33, 255, 257, 2047, 2049}) {
      for (const unsigned with : {0u, C::kShifted | C::kSample | 0u}) {
        ++seed;
        check_case(dtype, 4, V, with, int(seed % 3), seed);
      }
    }
    for (const int64_t V : {8191, 8192, 8193, 16383, 16384, 16385}) {
      for (const unsigned with : {0u, C::kShifted | C::kSample | C::kTies | 0u}) {
        ++seed;
        check_case(dtype, 2, V, with, int(seed % 3), seed);
      }
    }
  }
}

TEST(every_shift) {
  for (const dlm::DType dtype : kTypes) {
    for (uint64_t seed = 100; seed < 116; ++seed)
      check_case(dtype, 4, 500 + int64_t(seed % 3), C::kShifted | C::kBanned, 0, seed);
  }
}

TEST(random_arguments) {
  Random random(7);
  for (uint64_t seed = 1000; seed < 1200; ++seed) {
    const unsigned with = random.word() & random.word() & 0xffff;
    const int64_t V = 1 + random.below(random.below(4) ? 700 : 9000);
    check_case(kTypes[seed % 3], 4, V, with, int(random.below(3)), seed);
  }
}

TEST(filters) {
  uint64_t seed = 2000;
  for (const unsigned which : {C::kTopK | 0u, C::kTopP | 0u, C::kTopK | C::kTopP | 0u}) {
    for (const unsigned order : {0u, C::kTopPFirst | 0u}) {
      for (const unsigned crossing : {0u, C::kDropCrossing | 0u}) {
        for (const unsigned more :
             {0u, C::kSample | C::kTies | 0u, C::kSample | C::kSpecial | 0u}) {
          for (int distribution = 0; distribution < 3; ++distribution) {
            ++seed;
            check_case(kTypes[seed / 3 % 3], 4, 300, which | order | crossing | more, distribution,
                       seed);
          }
        }
      }
    }
  }
}

TEST(many_tiles) {
  check_case(dlm::DType::kBFloat16, 2, 126464, C::kSample, 0, 3200);
  check_case(dlm::DType::kFloat32, 1, 300001, C::kSample | C::kTopP | C::kShifted, 2, 3204);
  check_case(dlm::DType::kBFloat16, 2, 40000, C::kTwoValues | C::kTopP, 2, 3206);
  check_case(dlm::DType::kFloat16, 2, 50000, C::kBias | C::kGuidance | C::kSample | C::kPeaked, 1,
             3208);
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    check_case(dlm::DType::kBFloat16, 2, 17003, C::kSample | C::kShifted, 0, 4000);
    check_case(dlm::DType::kFloat32, 2, 900, C::kSample | C::kTopK | C::kTopP, 2, 4004);
    check_case(dlm::DType::kBFloat16, 2, 17003, C::kTies | C::kTopK | C::kTopP, 2, 4008);
  });
}

// What a row gives depends on the row alone: not on where it lies in memory, nor on other rows.
TEST(rows_are_independent) {
  for (const dlm::DType dtype : kTypes) {
    C c(dtype, 6, 9001, C::kSample | C::kTopP, dlm::Distribution::kFiltered, 5000);
    run(c.start());
    const int64_t size = dtype == dlm::DType::kFloat32 ? 4 : 2;
    for (int64_t n = 0; n < 6; ++n) {
      if (skipped(uint64_t(n))) continue;
      // Row n alone, `n` elements from the start of an allocation that ends with it.
      const auto* row = static_cast<const uint8_t*>(c.p.logits) + n * c.p.logits_stride * size;
      Array<uint8_t> moved(size_t((n + c.p.V) * size));
      std::copy(row, row + c.p.V * size, moved.begin() + n * size);
      dlm::TokenConfidenceParams p = c.p;
      p.N = p.R = 1, p.logits = moved.data() + n * size, p.given += n;
      p.temperature = from_row(p.temperature, n), p.top_p = from_row(p.top_p, n);
      p.random.seed = from_row(p.random.seed, n), p.random.step = from_row(p.random.step, n);
      p.random.redraw = from_row(p.random.redraw, n);
      p.random.position += n;
      Array<int64_t> token(1), argmax(1);
      Array<float> floats(5);
      Array<int32_t> flags(1);
      p.token = token.data(), p.argmax = argmax.data(), p.flags = flags.data();
      p.confidence = &floats[0], p.logsumexp = &floats[1], p.p_given = &floats[2];
      p.margin = &floats[3], p.entropy = &floats[4];
      Array<uint8_t> workspace(size_t(dlm::cuda::workspace_of(p)), 0xff);
      run(dlm::cuda::start_token_confidence(p, workspace.data(), nullptr));
      bool same = token[0] == c.token[size_t(n)] && argmax[0] == c.argmax[size_t(n)];
      for (int64_t k = 0; k < 5; ++k)
        same &= !memcmp(&floats[size_t(k)], &c.statistics[size_t(k * 6 + n)], sizeof(float));
      CHECK(same, "row %d, type %d", int(n), int(dtype));
    }
  }
}

// Shards of the vocabulary say together what the whole says, with the same bits in any cut; and
// read nothing of each other.
TEST(shards) {
  uint64_t seed = 6000;
  for (const dlm::DType dtype : kTypes) {
    for (const unsigned with : {C::kSample | 0u, C::kSample | C::kGuidance | C::kRowMap | 0u,
                                C::kSample | C::kBias | C::kBanned | C::kBitmask | 0u,
                                C::kTies | 0u, C::kSample | C::kSpecial | C::kWild | 0u}) {
      for (const int64_t V : {700, 5003}) {
        if (skipped(++seed)) continue;
        C c(dtype, 4, V, with, dlm::Distribution(seed % 3), seed);
        const int64_t size = dlm::element_size(dtype), gap = int64_t(seed % 4);
        const std::string wrong =
            wrong_in_shards(c, [&](int64_t first, int64_t end, int64_t* words) {
              dlm::TokenConfidenceParams p = c.p;
              const Columns logits(p.logits, p.R, p.logits_stride, first, end, size, gap);
              p.logits = logits.begin(), p.logits_stride = logits.stride;
              const Columns uncond(c.uncond.data(), p.R, p.uncond_stride, first, end, size, 1);
              if (p.uncond_logits)
                p.uncond_logits = uncond.begin(), p.uncond_stride = uncond.stride;
              const ShardOf own(c, first, end, p);
              p.partial = words;
              Array<uint8_t> workspace(size_t(dlm::cuda::workspace_of(p)), 0xff);
              run(dlm::cuda::start_token_confidence(p, workspace.data(), nullptr));
            });
        CHECK(wrong.empty(), "seed %d: %s", int(seed), wrong.c_str());
      }
    }
  }
}

// Equal maxima in several tiles, and a maximum that only its last copy's tile has.
TEST(ties_across_tiles) {
  for (const auto& [first, second] : {std::pair{3, 40000}, {20000, 20001}, {16383, 16384}}) {
    C c(dlm::DType::kBFloat16, 1, 40001, 0, dlm::Distribution::kRaw, 1);
    auto* logits = reinterpret_cast<dlm::BFloat16*>(c.logits.data());
    for (int64_t v = 0; v < c.p.V; ++v) logits[v] = dlm::from_float<dlm::BFloat16>(-2);
    logits[first] = logits[second] = dlm::from_float<dlm::BFloat16>(7);
    run(c.start());
    const double total = 2 + (c.p.V - 2) * std::exp(-9.0);
    CHECK(c.argmax[0] == first && c.token[0] == first, "argmax %d", int(c.argmax[0]));
    CHECK(c.statistics[3] == 0 && close(c.statistics[0], 1 / total, 1e-6), "margin %g, p %g",
          c.statistics[3], c.statistics[0]);
  }
}

// Near certainty, entropy and logsumexp keep their relative accuracy.
TEST(small_probabilities) {
  for (float gap = 1; gap < 80; gap += 3.7f) {
    C c(dlm::DType::kFloat32, 1, 2, 0, dlm::Distribution::kRaw, 1);
    auto* logits = reinterpret_cast<float*>(c.logits.data());
    logits[0] = -gap, logits[1] = 0;
    run(c.start());
    const double tail = std::log1p(std::exp(-double(gap)));
    const double entropy = tail + gap / (1 + std::exp(double(gap)));
    CHECK(close(c.statistics[1] / tail, 1, 1e-5), "logsumexp %g: %g", gap, c.statistics[1]);
    CHECK(close(c.statistics[4] / entropy, 1, 1e-5), "entropy %g: %g", gap, c.statistics[4]);
  }
}

// Quotients of huge logits and tiny temperatures overflow in the CPU's way.
TEST(huge_logits) {
  constexpr float largest = 3.402823466e+38f;
  const float rows[][3] = {
      {-largest, largest, largest}, {INFINITY, -largest, 0}, {-largest, -INFINITY, -INFINITY}};
  for (const float temperature : {1e-30f, 0.5f, 1.0f, 1e38f}) {
    for (int distribution = 0; distribution < 3; ++distribution) {
      for (const auto& row : rows) {
        C c(dlm::DType::kFloat32, 1, 3, C::kSample | C::kTopK, dlm::Distribution(distribution), 1);
        std::copy(row, row + 3, reinterpret_cast<float*>(c.logits.data()));
        c.temperature[0] = temperature, c.top_k[0] = 2;
        c.write_to(c.expected_token, c.expected_argmax, c.expected_statistics, c.expected_flags);
        c.run_on_cpu();
        c.write_to(c.token, c.argmax, c.statistics, c.flags);
        run(c.start());
        CHECK(c.token[0] == c.expected_token[0] && c.flags[0] == c.expected_flags[0], "token %d",
              int(c.token[0]));
        for (size_t k = 0; k < 5; ++k) {
          const double want = c.expected_statistics[k];
          CHECK(close(c.statistics[k], want, 2e-6), "T %g: statistic %d is %g, expected %g",
                temperature, int(k), c.statistics[k], want);
        }
      }
    }
  }
}

#ifdef DLM_SIMT
// The logits are read once, in whole sectors: one chunk more in a tile that starts within one.
TEST(memory_traffic) {
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t shift : {0, 1}) {
      C c(dtype, 2, 20000, 0, dlm::Distribution::kRaw, 1);
      const int64_t size = dtype == dlm::DType::kFloat32 ? 4 : 2;
      c.p.logits = c.logits.data() + shift * size, c.p.V -= shift;
      simt::counters() = {};
      run(c.start());
      const auto& counts = simt::counters();
      const uint64_t ideal = uint64_t(2 * 20000 * size / 32), got = counts.gmem_sectors;
      // The scan counts, and a chunk that each warp looks at again. Where a row starts between
      // addresses of vector loads, a sector more for each run of 512 bytes.
      const uint64_t again = 2 * dlm::cuda::kFinishWarps * (uint64_t(256 * size / 32) + 2);
      const uint64_t most = again + (shift ? ideal + ideal / 16 + 2 : ideal);
      CHECK(ideal <= got && got <= most, "%llu sectors, ideal %llu", (unsigned long long)got,
            (unsigned long long)ideal);
      CHECK(counts.smem_conflicts == 0, "%llu conflicts",
            (unsigned long long)counts.smem_conflicts);
    }
  }
}
#endif
