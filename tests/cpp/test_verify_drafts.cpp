// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "cpu/verify_drafts_generic.cpp"
#include "kernels/verify_case.h"

using namespace check;
using C = VerifyCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kFloat32, dlm::DType::kBFloat16, dlm::DType::kFloat16};

void check_case(dlm::DType dtype, int64_t B, int64_t W, int64_t V, unsigned with, uint64_t seed) {
  C c(dtype, B, W, V, with, seed);
  run(dlm::cuda::start_verify_drafts(c.p, c.workspace.data(), nullptr));
  CHECK(c.wrong().empty(), "arguments %x, seed %d: %s", with, int(seed), c.wrong().c_str());
}

}  // namespace

// Every set of arguments.
TEST(all_combinations) {
  uint64_t seed = 0;
  for (unsigned with = 0; with < 1024; ++with) {
    if ((with & C::kHostile) && !((with & C::kRatio) && (with & C::kBanned))) continue;
    ++seed;
    check_case(kTypes[seed % 3], 2, int64_t(seed % 5), 40 + int64_t(seed % 17), with, seed);
  }
}

// Around a chunk, a warp's drafts, a block's logits.
TEST(every_width) {
  uint64_t seed = 2000;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t V : {1, 2, 7, 8, 9, 31, 255, 2047, 2048, 2049, 4096, 4099, 9000}) {
      for (const unsigned with : {C::kRatio | 0u, C::kRatio | C::kShifted | C::kSpecial | 0u})
        check_case(dtype, 3, 2, V, with, ++seed);
    }
  }
  for (const int64_t W : {0, 1, 31, 32, 33, 63, 64, 65, 200}) {
    for (const unsigned with : {0u, C::kRatio | 0u, C::kRatio | C::kAgree | 0u})
      check_case(kTypes[W % 3], 3, W, 50, with, ++seed);
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    uint64_t seed = 3000;
    for (const unsigned with : {C::kRatio | 0u, C::kRatio | C::kMaps | C::kCold | 0u}) {
      check_case(dlm::DType::kBFloat16, 3, 3, 5003, with, ++seed);
      check_case(dlm::DType::kFloat32, 3, 40, 300, with | C::kAgree, ++seed);
    }
  });
}

// What a row gives depends on the row alone.
TEST(rows_are_independent) {
  C c(dlm::DType::kBFloat16, 6, 3, 4001, C::kRatio | C::kShifted, 4000);
  run(dlm::cuda::start_verify_drafts(c.p, c.workspace.data(), nullptr));
  for (int64_t b = 0; b < 6; ++b) {
    dlm::VerifyDraftsParams p = c.p;
    p.B = 1, p.drafts += b * p.W, p.token += b * (p.W + 1);
    p.logits = static_cast<const uint16_t*>(p.logits) + b * (p.W + 1) * p.logits_stride;
    p.draft_logits = static_cast<const uint16_t*>(p.draft_logits) + b * p.W * p.draft_stride;
    p.logsumexp += b * (p.W + 1), p.draft_logsumexp += b * p.W;
    p.temperature = from_row(p.temperature, b);
    p.random.seed = from_row(p.random.seed, b), p.random.step = from_row(p.random.step, b);
    p.random.position += b;
    Array<int32_t> accepted(1);
    Array<int64_t> tokens(size_t(p.W + 1));
    p.accepted = accepted.data(), p.tokens = tokens.data();
    run(dlm::cuda::start_verify_drafts(p, c.workspace.data(), nullptr));
    const auto* whole = c.tokens.data() + b * (p.W + 1);
    CHECK(accepted[0] == c.accepted[size_t(b)] && std::equal(tokens.begin(), tokens.end(), whole),
          "row %d", int(b));
  }
}

// Two ids whose noise gives the same value: the lower one is drawn, whether one thread finds both,
// Two tokens of equal key in one chunk, and two chunks of equal key.
TEST(ties_fall_to_the_lowest_id) {
  constexpr int64_t V = 8192;
  for (const bool of_chunks : {false, true}) {
    C c(dlm::DType::kBFloat16, 1, 1, V, C::kRatio, 1);
    int64_t low = -1, high = -1;
    const int64_t apart = of_chunks ? dlm::kRaceChunk : 1;
    const int64_t count = of_chunks ? V / apart : dlm::kRaceChunk;
    for (c.seed[0] = 0; c.seed[0] < 1000000 && high < 0; c.seed[0] += high < 0) {
      std::vector<std::pair<float, int64_t>> keys;
      for (int64_t k = 0; k < count; k += 4) {
        const dlm::Philox4 bits = dlm::philox(
            uint64_t(c.seed[0]), uint32_t(c.position[0]), uint32_t(c.step[0]),
            of_chunks ? dlm::Stream::kResidualChunk : dlm::Stream::kResidual, uint32_t(k / 4));
        for (int j = 0; j < 4; ++j)
          keys.emplace_back(dlm::weight_key(0.5f, bits.word[j]), (k + j) * apart);
      }
      std::sort(keys.begin(), keys.end());
      for (size_t i = 1; i < keys.size() && high < 0; ++i) {
        if (keys[i - 1].first == keys[i].first) low = keys[i - 1].second, high = keys[i].second;
      }
    }
    CHECK(high >= 0, "no tie found");
    // The target is one of the two, the draft an id of which it gives nothing.
    const int64_t draft = high - low > 1 ? low + 1 : high + 1;
    for (int64_t v = 0; v < V; ++v) {
      C::write(c.logits, c.p.dtype, v, v == low || v == high ? 0 : -INFINITY);
      C::write(c.draft_logits, c.p.dtype, v, v == draft ? 0 : -INFINITY);
    }
    c.temperature[0] = 1, c.drafts[0] = c.sound_drafts[0] = draft;
    c.logsumexp[0] = std::log(2.0f), c.draft_logsumexp[0] = 0;
    c.expect();
    run(dlm::cuda::start_verify_drafts(c.p, c.workspace.data(), nullptr));
    CHECK(c.accepted[0] == 0 && c.tokens[0] == low && c.wrong().empty(), "ids %d and %d: %d; %s",
          int(low), int(high), int(c.tokens[0]), c.wrong().c_str());
  }
}

#ifdef DLM_SIMT
// Rows that accept all their drafts read single logits; a rejected draft has two rows read.
TEST(memory_traffic) {
  for (const bool rejects : {false, true}) {
    C c(dlm::DType::kBFloat16, 1, 3, 8192, C::kRatio, 1);
    for (int w = 0; w < 3; ++w) c.drafts[size_t(w)] = 5;
    c.p.leniency = rejects ? 1e30f : 0.0f;
    simt::counters() = {};
    run(dlm::cuda::start_verify_drafts(c.p, c.workspace.data(), nullptr));
    const auto& n = simt::counters();
    CHECK(c.accepted[0] == (rejects ? 0 : 3), "accepted %d", c.accepted[0]);
    CHECK(n.gmem_sectors == (rejects ? 2 * 8192 * 2 / 32 : 0) &&
              n.gmem_sectors == n.gmem_ideal_sectors,
          "%zu sectors, ideal %zu", size_t(n.gmem_sectors), size_t(n.gmem_ideal_sectors));
  }
}
#endif
