// SPDX-License-Identifier: Apache-2.0
// block_attention's AMX kernel, run on the model of amx/ (or on a processor that has AMX), against
// float64 and against the AVX-512 kernel; and the model itself.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <thread>

#include "amx/kernels.h"
#include "amx/trap.h"
#include "kernels/attention_case.h"
#include "must_fail.h"
#include "simt/fiber.h"

using namespace check;
using amx::KernelFault, amx::Slip, amx::TileModel;
using dlm::BFloat16;
using dlm::BlockAttentionParams;
using Kernels = dlm::cpu::BlockAttentionKernels;
using Shape = AttentionShape;
using Case = AttentionCase<BFloat16>;

namespace {

const bool kCanRun = [] {
  if (__builtin_cpu_supports("avx512bf16")) return true;
  printf("this processor is without AVX512_BF16\n");
  exit(77);
}();

// --- kernels -----------------------------------------------------------------------------------

struct Workspace {
  dlm::cpu::BlockAttentionWork work;
  std::vector<float> floats;
  Workspace(const Kernels& kernels, BlockAttentionParams* p)
      : work(kernels.work(*p)), floats(size_t(work.workspace), NAN) {
    p->workspace = floats.data();
  }
};

std::string attend(const Kernels& kernels, BlockAttentionParams p, Slip slip = Slip::kNone) {
  if (p.k_new) dlm::cpu::generic::scatter_new_rows(p, 0, p.B * p.G);
  Workspace workspace(kernels, &p);
  const std::string wrong = amx::run([&] { kernels.attend(p, 0, workspace.work.items); }, slip);
  if (!wrong.empty()) return "model: " + wrong;
  kernels.merge(p, 0, workspace.work.merge_items);
  return "";
}

// Both kernels use bf16 weights: they differ by a rounding of the result and of each weight.
constexpr double kOutTolerance = 1.6e-2, kLseTolerance = 8e-6;

// The first difference from the definition, or from the AVX-512 kernel.
std::string wrong_case(Case& c, const Kernels& kernels, Slip slip = Slip::kNone) {
  std::string wrong = attend(kernels, c.p, slip);
  if (wrong.empty()) {
    wrong = c.wrong();
    if (!wrong.empty()) wrong = "value: " + wrong;
  }
  if (!wrong.empty()) return wrong;
  Array<BFloat16> out(c.out.size(), dlm::from_float<BFloat16>(NAN));
  Array<float> lse(c.lse.size(), NAN);
  BlockAttentionParams p = c.p;
  p.out = out.data(), p.lse = lse.data();
  attend(dlm::cpu::avx512bf16::block_attention(dlm::DType::kBFloat16), p);
  for (size_t i = 0; i < out.size(); ++i) {
    const double got = dlm::to_float(c.out[i]), other = dlm::to_float(out[i]);
    if (!close(got, other, kOutTolerance)) return "value: out is not as with AVX-512";
  }
  for (size_t i = 0; i < lse.size(); ++i) {
    if (!close(c.lse[i], lse[i], kLseTolerance)) return "value: lse is not as with AVX-512";
  }
  return "";
}

void check_case(Case& c) {
  const std::string wrong = wrong_case(c, amx::kernels());
  CHECK(wrong.empty(), "%s", wrong.c_str());
}
void check_case(const Shape& shape, uint64_t seed) {
  Case c(shape, seed);
  check_case(c);
}

// Attention of `rows` rows from row `first` of batch row b alone, over caches as they stand.
struct Part {
  Array<BFloat16> out;
  Array<float> lse;
  Part(const Case& c, int64_t b, int64_t first, int64_t rows)
      : out(size_t(rows * c.s.H * c.s.D), dlm::from_float<BFloat16>(NAN)),
        lse(size_t(rows * c.s.H), NAN) {
    BlockAttentionParams p = c.p;
    p.B = 1, p.Q = rows, p.k_new = p.v_new = nullptr;
    p.q = c.q.data() + b * p.q_stride[0] + first * p.q_stride[1];
    p.k_cache = const_cast<BFloat16*>(c.k_cache.data()) + b * p.k_cache_stride[0];
    p.v_cache = const_cast<BFloat16*>(c.v_cache.data()) + b * p.v_cache_stride[0];
    p.slots += b * c.s.Q + first;
    if (p.kv_range) p.kv_range += b * p.N * 2;
    if (p.block_origin) p.block_origin.data += b;
    if (p.q_limit) p.q_limit += b * c.s.Q + first, p.k_order += b * c.s.S;
    p.out = out.data(), p.lse = lse.data();
    const std::string wrong = attend(amx::kernels(), p);
    CHECK(wrong.empty(), "%s", wrong.c_str());
  }
  bool same_bits(const Case& c, int64_t b, int64_t first) const {
    const size_t row = size_t((b * c.s.Q + first) * c.s.H);
    return !std::memcmp(out.data(), c.out.data() + row * size_t(c.s.D), out.size() * 2) &&
           !std::memcmp(lse.data(), c.lse.data() + row, lse.size() * 4);
  }
};

// --- the model ---------------------------------------------------------------------------------

struct Config {
  uint8_t bytes[64] = {};
  Config() {
    bytes[0] = 1;
    for (int i = 0; i < TileModel::kTiles; ++i) shape(i, 16, 64);
  }
  Config& shape(int tile, int rows, int row_bytes) {
    bytes[16 + 2 * tile] = uint8_t(row_bytes);
    bytes[48 + tile] = uint8_t(rows);
    return *this;
  }
};

uint32_t pair(float first, float second) {
  return dlm::from_float<BFloat16>(first).bits | uint32_t(dlm::from_float<BFloat16>(second).bits)
                                                     << 16;
}
struct Tile {
  uint32_t word[16][16] = {};
};

bool says(const char* got, const char* expected) { return got && std::strstr(got, expected); }

// One product as an instruction, on the model or the processor.
void __attribute__((noinline)) product(const Config& config, Tile* sums, const Tile& a,
                                       const Tile& b) {
  __asm__ volatile(
      "ldtilecfg (%0)\n\t"
      "tileloadd (%1,%4,1), %%tmm1\n\t"
      "tileloadd (%2,%4,1), %%tmm5\n\t"
      "tileloadd (%3,%4,1), %%tmm7\n\t"
      "tdpbf16ps %%tmm7, %%tmm5, %%tmm1\n\t"
      "tilestored %%tmm1, (%1,%4,1)\n\t"
      "tilerelease" ::"r"(&config),
      "r"(sums), "r"(&a), "r"(&b), "r"(int64_t(64))
      : "memory");
}

void product_by_model(Tile* sums, const Tile& a, const Tile& b) {
  TileModel model;
  for (const char* refused :
       {model.load_config(Config().bytes), model.load(1, sums, 64), model.load(5, &a, 64),
        model.load(7, &b, 64), model.dot(1, 5, 7), model.store(1, sums, 64)}) {
    CHECK(!refused, "%s", refused);
  }
}

}  // namespace

TEST(model_multiplies) {
  Random random(1);
  TileModel model;
  for (const auto& [rows, depth, columns] : {std::tuple{16, 16, 16}, {3, 7, 5}, {1, 1, 1}}) {
    Config config;
    config.shape(0, rows, 4 * columns).shape(1, rows, 4 * depth).shape(2, depth, 4 * columns);
    Tile sums, a, b, got;
    double value_a[16][32], value_b[16][32];
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        for (int half = 0; half < 2; ++half) {
          value_a[i][2 * j + half] = double(random.below(31)) - 15;
          value_b[i][2 * j + half] = double(random.below(31)) - 15;
        }
        a.word[i][j] = pair(float(value_a[i][2 * j]), float(value_a[i][2 * j + 1]));
        b.word[i][j] = pair(float(value_b[i][2 * j]), float(value_b[i][2 * j + 1]));
        sums.word[i][j] = dlm::float_to_bits(float(i - j));
        got.word[i][j] = 77;
      }
    }
    CHECK(!model.load_config(config.bytes) && !model.load(0, &sums, 64) && !model.load(1, &a, 64) &&
              !model.load(2, &b, 64) && !model.dot(0, 1, 2) && !model.store(0, &got, 64),
          "the model refuses a product");
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        double want = m - n;  // small integers: exact in any order
        for (int k = 0; k < depth; ++k) {
          want += value_a[m][2 * k] * value_b[k][2 * n];
          want += value_a[m][2 * k + 1] * value_b[k][2 * n + 1];
        }
        const bool inside = m < rows && n < columns;
        const double is = inside ? double(dlm::bits_to_float(got.word[m][n])) : got.word[m][n];
        CHECK(is == (inside ? want : 77), "[%d, %d] of %d x %d x %d is %g", m, n, rows, depth,
              columns, is);
      }
    }
  }
}

// First elements of pairs and second ones are summed apart, then together, then into the sum; every
// addition rounds to nearest even; subnormal numbers are zeros.
TEST(model_rounds_as_documented) {
  const auto sum_of = [](float before, std::initializer_list<uint32_t> left,
                         std::initializer_list<uint32_t> right) {
    Tile sums, a, b;
    sums.word[0][0] = dlm::float_to_bits(before);
    std::copy(left.begin(), left.end(), a.word[0]);
    int k = 0;
    for (const uint32_t word : right) b.word[k++][0] = word;
    product_by_model(&sums, a, b);
    return dlm::bits_to_float(sums.word[0][0]);
  };
  const float big = 0x1p24f, tiny = 0x1p-126f;
  const uint32_t ones = pair(1, 1), first = pair(1, 0), second = pair(0, 1);
  // 2^24 + 1 is 2^24: the two ones of the second halves, or of a sum of their own, count.
  CHECK(sum_of(0, {pair(big, 1), ones}, {ones, second}) == big + 2, "second halves apart");
  CHECK(sum_of(0, {pair(big, 0), first, first}, {ones, ones, ones}) == big, "first halves in turn");
  CHECK(sum_of(big, {pair(1, 1)}, {ones}) == big + 2, "pairs before the sum");
  CHECK(sum_of(big, {first, first}, {ones, ones}) == big + 2, "products before the sum");
  CHECK(sum_of(0, {pair(big, 0), pair(3, 0)}, {ones, ones}) == big + 4, "ties to even");
  CHECK(sum_of(0, {pair(0x1p64f, 0)}, {pair(0x1p64f, 0)}) == INFINITY, "overflow");
  CHECK(sum_of(0, {pair(0x1p-64f, 0)}, {pair(0x1p-64f, 0)}) == 0, "a subnormal product");
  CHECK(sum_of(0, {pair(tiny, 0)}, {pair(1, 0)}) == tiny, "the smallest normal number");
  CHECK(sum_of(0, {pair(tiny / 2, 0)}, {pair(2, 0)}) == 0, "a subnormal factor");
  CHECK(sum_of(tiny / 2, {}, {}) == 0, "a subnormal sum");
  CHECK(sum_of(1, {pair(0x1p100f, 0)}, {pair(0x1p-100f, 0)}) == 2, "far exponents");
  CHECK(std::isnan(sum_of(0, {pair(INFINITY, 0)}, {pair(0, 0)})), "infinity times zero");
  CHECK(std::isnan(sum_of(0, {pair(NAN, 0)}, {pair(0, 0)})), "NaN");
}

TEST(model_notices_misuse) {
  Tile tile;
  TileModel model;
  CHECK(says(model.zero(0), "without configuration"), "tilezero");
  CHECK(says(model.load(0, &tile, 64), "without configuration"), "tileloadd");
  CHECK(says(model.store(0, &tile, 64), "without configuration"), "tilestored");
  CHECK(says(model.dot(0, 1, 2), "without configuration"), "tdpbf16ps");
  CHECK(!model.release() && !model.load_config(Config().bytes) && model.configured(), "ldtilecfg");
  CHECK(says(model.dot(0, 1, 1), "with itself") && says(model.dot(1, 1, 0), "with itself"), "same");

  const auto configured = [&](const Config& config) { return model.load_config(config.bytes); };
  CHECK(!configured(Config().shape(4, 0, 0)), "a tile left out");
  CHECK(says(model.zero(4), "leaves out") && says(model.dot(0, 4, 6), "leaves out"), "its use");
  CHECK(!configured(Config().shape(0, 8, 64)), "a short tile");
  CHECK(says(model.dot(0, 4, 6), "do not fit") && !model.dot(1, 4, 6), "more rows than the sums");
  CHECK(!configured(Config().shape(4, 16, 60)), "narrow rows");
  CHECK(says(model.dot(0, 4, 6), "do not fit"), "depths that differ");
  CHECK(!configured(Config().shape(6, 16, 32)), "narrow rows");
  CHECK(says(model.dot(0, 4, 6), "do not fit"), "columns that differ");
  CHECK(!configured(Config().shape(4, 16, 62)), "half a word");
  CHECK(says(model.dot(0, 4, 6), "no whole words"), "half a word");

  CHECK(says(configured(Config().shape(3, 17, 64)), "16 rows"), "17 rows");
  CHECK(says(configured(Config().shape(3, 16, 65)), "64 bytes"), "65 bytes");
  CHECK(says(configured(Config().shape(3, 0, 64)), "of no bytes, or none"), "no rows");
  CHECK(says(configured(Config().shape(3, 16, 0)), "of no bytes, or none"), "empty rows");
  CHECK(says(configured(Config().shape(8, 16, 64)), "ninth"), "nine tiles");
  Config other;
  other.bytes[0] = 2;
  CHECK(says(configured(other), "palette"), "palette 2");
  other.bytes[0] = 1, other.bytes[1] = 1;
  CHECK(says(configured(other), "start row"), "start row");
  other.bytes[1] = 0, other.bytes[9] = 1;
  CHECK(says(configured(other), "reserved"), "reserved byte");

  // A configuration empties the tiles; palette 0 gives them back.
  tile.word[2][3] = 5;
  CHECK(!configured(Config()) && !model.load(0, &tile, 64) && !configured(Config()), "again");
  CHECK(!model.store(0, &tile, 64) && tile.word[2][3] == 0, "a tile survives");
  other = Config();
  other.bytes[0] = 0;
  CHECK(!configured(other) && !model.configured(), "palette 0");
}

TEST(instructions_are_decoded) {
  // All ways to write an address, and tile numbers in every place.
  static Config config;
  static uint32_t memory[16][48];
  Random random(2);
  for (auto& row : memory) {
    for (uint32_t& x : row) x = pair(float(random.below(9)), float(random.below(9)));
  }
  uint32_t got[2][16][16];
  const std::string wrong = amx::run([&] {
    __asm__ volatile(
        "lea %[config], %%r12\n\t"
        "ldtilecfg -16(%%r12)\n\t"
        "lea -0x1000(%[memory]), %%r13\n\t"
        "mov $48, %%r14\n\t"
        "tileloadd 0x1000(%%r13,%%r14,4), %%tmm6\n\t"
        "mov %[memory], %%rbp\n\t"
        "tileloadd 64(%%rbp,%[stride]), %%tmm3\n\t"
        "tileloadd (%%rbp,%[stride]), %%tmm1\n\t"
        "tilezero %%tmm7\n\t"
        "tdpbf16ps %%tmm3, %%tmm6, %%tmm7\n\t"
        "mov $64, %%r14\n\t"
        "tilestored %%tmm7, (%[got],%%r14)\n\t"
        "tilestored %%tmm1, 0x400(%[got],%%r14)\n\t"
        "tilerelease" ::[config] "m"(config.bytes[16]),
        [memory] "r"(memory), [stride] "r"(int64_t(192)), [got] "r"(got)
        : "memory", "r12", "r13", "r14");
  });
  CHECK(wrong.empty(), "%s", wrong.c_str());
  TileModel model;
  uint32_t want[2][16][16];
  const char* refused = nullptr;
  for (const char* step :
       {model.load_config(config.bytes), model.load(6, memory, 192),
        model.load(3, memory[0] + 16, 192), model.load(1, memory, 192), model.zero(7),
        model.dot(7, 6, 3), model.store(7, want[0], 64), model.store(1, want[1], 64)}) {
    if (step) refused = step;
  }
  CHECK(!refused, "%s", refused);
  CHECK(!std::memcmp(got, want, sizeof got), "not what was written down");
}

// Elsewhere the trap is compared with the model. The kernel does not depend on the order in which a
// processor sums: bits that differ are told, not refused.
TEST(model_agrees_with_the_processor) {
  Random random(3);
  int words = 0, different = 0;
  for (int turn = 0; turn < 50; ++turn) {
    Tile sums, a, b;
    for (Tile* tile : {&sums, &a, &b}) {
      for (auto& row : tile->word) {
        for (uint32_t& x : row) x = (random.word() & 0x80ff80ffu) | 0x3f003f00u;  // 0.5 to 2
      }
    }
    Tile got = sums, want = sums;
    product_by_model(&want, a, b);
    const std::string wrong = amx::run([&] { product(Config(), &got, a, b); });
    CHECK(wrong.empty(), "%s", wrong.c_str());
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j, ++words) {
        different += got.word[i][j] != want.word[i][j];
        const float is = dlm::bits_to_float(got.word[i][j]);
        CHECK(close(is, dlm::bits_to_float(want.word[i][j]), 1e-5), "[%d, %d] is %g", i, j, is);
      }
    }
  }
  CHECK(amx::on_processor() || different == 0, "%d words differ from the model's", different);
  if (amx::on_processor()) {
    printf("  %d of %d words differ from the model's\n", different, words);
  } else {
    printf("  no AMX here: consistent with the model only\n");
  }
}

TEST(every_mode) {
  uint64_t seed = 0;
  for (const int64_t D : {64, 80, 128, 256, 512}) {
    for (int mode = 0; mode < Shape::kModes; ++mode) {
      check_case({.B = 2, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .mode = mode}, ++seed);
      check_case(
          {.B = 1, .Q = 21, .S = 70, .H = 2, .G = 1, .D = D, .mode = mode, .scattered = true},
          ++seed);
    }
  }
}

TEST(shapes) {
  uint64_t seed = 100;
  for (const int64_t D : {8, 16, 24, 40, 96, 120, 192, 248}) {
    check_case({.B = 1, .Q = 9, .S = 67, .H = 2, .G = 2, .D = D, .mode = Shape::kCausal}, ++seed);
  }
  for (const auto& [Q, H, G] : {std::tuple{1, 1, 1},
                                {1, 7, 1},
                                {5, 1, 1},
                                {4, 14, 2},
                                {2, 8, 1},
                                {17, 1, 1},
                                {9, 7, 1},
                                {32, 1, 1},
                                {33, 1, 1}}) {
    for (const int64_t S : {1, 63, 64, 65, 131}) {
      if (S < Q) continue;
      check_case({.B = 1, .Q = Q, .S = S, .H = H, .G = G, .mode = int(seed % 3)}, ++seed);
    }
  }
}

TEST(many_rows_and_slots) {
  check_case({.B = 1, .Q = 75, .S = 1500, .H = 8, .G = 1, .mode = Shape::kBlockCausal}, 200);
  check_case({.B = 1, .Q = 32, .S = 1030, .H = 7, .G = 1, .D = 128}, 201);
  check_case({.B = 1, .Q = 5, .S = 1100, .H = 2, .G = 1, .mode = Shape::kRanges}, 202);
  check_case({.B = 1, .Q = 4, .S = 600, .H = 1, .G = 1, .D = 256, .mode = Shape::kCap}, 203);
  check_case({.B = 1, .Q = 1, .S = 1500, .H = 1, .G = 1, .mode = Shape::kOrder}, 204);
}

TEST(new_rows_and_who_sees_them) {
  uint64_t seed = 250;
  for (int mode = 0; mode < Shape::kModes; ++mode) {
    check_case({.B = 2, .Q = 21, .S = 150, .H = 4, .G = 2, .mode = mode, .K = 40, .hides = true},
               ++seed);
    check_case(
        {.B = 1, .Q = 5, .S = 90, .H = 2, .G = 1, .mode = mode, .infinite = true, .hides = true},
        ++seed);
  }
}

TEST(what_is_not_seen_is_not_multiplied) {
  uint64_t seed = 300;
  for (const int mode : {Shape::kFull, Shape::kCausal, Shape::kOrder}) {
    for (const auto& [Q, H] : {std::pair{3, 1}, {9, 2}, {40, 1}}) {
      for (const int64_t D : {72, 128}) {
        check_case(
            {.B = 1, .Q = Q, .S = 90, .H = H, .G = 1, .D = D, .mode = mode, .infinite = true},
            ++seed);
      }
    }
  }
}

TEST(nothing_to_see) {
  Case c({.mode = Shape::kRanges}, 400);
  for (auto& x : c.ranges) x = 7;
  check_case(c);
  Case d({.S = 0, .fresh = false, .scattered = true}, 401);
  for (auto& x : d.slots) x = -1;
  check_case(d);
}

// A row's bits depend on nothing but what it sees: not on the rows beside it, nor on whether its
// slots are divided among items.
TEST(rows_do_not_depend_on_their_number) {
  uint64_t seed = 500;
  for (const auto& [H, S, D] : {std::tuple{1, 150, 80}, {7, 600, 64}}) {
    for (const int mode : {Shape::kBlockCausal, Shape::kOrder}) {
      Case c({.B = 1, .Q = 41, .S = S, .H = H, .G = 1, .D = D, .mode = mode}, ++seed);
      check_case(c);
      for (const int64_t row : {0, 7, 31, 32, 40}) {
        const int64_t rows = row == 7 ? 3 : 1;
        CHECK(Part(c, 0, row, rows).same_bits(c, 0, row), "row %d, H %d", int(row), int(H));
      }
    }
  }
  Case c({.B = 33, .Q = 3, .S = 600, .H = 1, .G = 1}, ++seed);
  check_case(c);
  for (const int64_t b : {0, 16, 32}) CHECK(Part(c, b, 0, 3).same_bits(c, b, 0), "row %d", int(b));
}

// Finite values beside NaN and infinities that a row does not see keep its bits, too.
TEST(garbage_that_only_others_see) {
  const Shape shape{
      .B = 1, .Q = 40, .S = 70, .H = 1, .G = 1, .mode = Shape::kCausal, .fresh = false};
  Case clean(shape, 600), spoiled(shape, 600);
  const size_t spoilt = spoiled.at(spoiled.p.v_cache_stride, 0, clean.slots[29], 0) + 3;
  spoiled.v_cache[spoilt] = spoiled.v_expected[spoilt] = dlm::from_float<BFloat16>(NAN);
  check_case(clean), check_case(spoiled);
  for (int64_t row = 0; row < 40; ++row) {
    for (int64_t d = 0; d < shape.D; ++d) {
      const size_t at = size_t(row * shape.D + d);
      const bool same = clean.out[at].bits == spoiled.out[at].bits;
      CHECK(same == (row < 29 || d != 3), "[%d, %d]", int(row), int(d));
    }
  }
}

// Tiles belong to a thread.
TEST(threads) {
  Case c({.B = 3, .Q = 9, .S = 140, .H = 4, .G = 2, .D = 128}, 700);
  const Kernels kernels = amx::kernels();
  dlm::cpu::generic::scatter_new_rows(c.p, 0, c.p.B * c.p.G);
  BlockAttentionParams p = c.p;
  Workspace workspace(kernels, &p);
  const int64_t items = workspace.work.items;
  std::string wrong[3];
  int64_t products[3] = {};
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      wrong[t] = amx::run([&] { kernels.attend(p, items * t / 3, items * (t + 1) / 3); });
      products[t] = amx::products();
    });
  }
  for (auto& thread : threads) thread.join();
  kernels.merge(p, 0, workspace.work.merge_items);
  for (int t = 0; t < 3; ++t) {
    CHECK(wrong[t].empty(), "%s", wrong[t].c_str());
    CHECK(products[t] > 0 || amx::on_processor(), "thread %d has multiplied no tiles", t);
  }
  const std::string different = c.wrong();
  CHECK(different.empty(), "%s", different.c_str());
}

// As many products of tiles as there are, and no more: 32 rows by 32 outputs by 32 elements are
// four.
TEST(work_done) {
  const Shape shape{.B = 1, .Q = 32, .S = 256, .H = 2, .G = 1, .D = 128, .fresh = false};
  Case c(shape, 800);
  check_case(c);
  attend(amx::kernels(), c.p);
  const int64_t blocks = shape.Q * shape.H / 32 * (shape.S / 32) * (shape.D / 32),
                want = 2 * 4 * blocks;
  CHECK(amx::on_processor() || amx::products() == want, "%d products, expected %d",
        int(amx::products()), int(want));
}

// --- planted faults ----------------------------------------------------------------------------

namespace {

template <KernelFault kernel, Slip slip>
std::string try_attention() {
  const Shape shapes[] = {
      {.B = 1, .Q = 5, .S = 75, .H = 4, .G = 2},
      {.B = 1,
       .Q = 40,
       .S = 140,
       .H = 1,
       .G = 1,
       .D = 80,
       .mode = Shape::kCausal,
       .infinite = true},
  };
  uint64_t seed = 900;
  for (const Shape& shape : shapes) {
    Case c(shape, ++seed);
    const std::string wrong = wrong_case(c, amx::kernels(kernel), slip);
    if (!wrong.empty()) return wrong;
  }
  return "";
}
template <KernelFault fault>
constexpr auto kernel = try_attention<fault, Slip::kNone>;
template <Slip fault>
constexpr auto slip = try_attention<KernelFault::kNone, fault>;

// A tile loaded from, or stored to, memory one word too short for it.
template <bool kStore>
std::string overrun() {
  Config config;
  Tile sums, whole;
  std::vector<uint32_t> small(255);
  auto* tile = reinterpret_cast<Tile*>(small.data());
  return amx::run(
      [&] { kStore ? product(config, tile, whole, whole) : product(config, &sums, *tile, whole); });
}

// What notices: "value", "model", "asan", "-" nothing; "?": undefined, since what lies behind an
// allocation is. In child processes, since a sanitizer's report ends one.
struct Fault {
  const char* name;
  std::string (*run)();
  const char *plain, *asan;
};
const Fault kFaults[] = {
    {"none", kernel<KernelFault::kNone>, "-", "-"},
    {"tail_not_padded", kernel<KernelFault::kTailNotPadded>, "value", "asan"},
    {"infinite_times_zero", kernel<KernelFault::kInfiniteTimesZero>, "value", "value"},
    {"no_configuration", slip<Slip::kNoConfiguration>, "model", "model"},
    {"no_release", slip<Slip::kNoRelease>, "model", "model"},
    {"no_zero", slip<Slip::kNoZero>, "value", "value"},
    {"no_store", slip<Slip::kNoStore>, "value", "value"},
    {"narrow_configuration", slip<Slip::kNarrowConfiguration>, "model", "model"},
    {"strided_load", slip<Slip::kStridedLoad>, "value", "value"},
    {"unstrided_store", slip<Slip::kUnstridedStore>, "value", "value"},
    {"swapped_operands", slip<Slip::kSwappedOperands>, "value", "value"},
    {"sums_mixed", slip<Slip::kSumsMixed>, "value", "value"},
    {"load_overrun", overrun<false>, "?", "asan"},
    {"store_overrun", overrun<true>, "?", "asan"},
};

}  // namespace

int check::run_fault(const char* name) {
  for (const Fault& fault : kFaults) {
    if (std::strcmp(fault.name, name)) continue;
    const std::string wrong = fault.run();
    printf("%s\n", wrong.empty() ? "-: nothing noticed" : wrong.c_str());
    return !wrong.empty();
  }
  fprintf(stderr, "no fault %s\n", name);
  return 2;
}

TEST(planted_faults_are_noticed) {
  char self[4096] = {};
  CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0, "/proc/self/exe is not readable");
  for (const Fault& fault : kFaults) {
    if (amx::on_processor()) break;  // it makes no slips, and no sanitizer sees its tiles
    const std::string command = std::string("'") + self + "' --fault " + fault.name + " 2>&1";
    FILE* child = popen(command.c_str(), "r");
    std::string output;
    char buffer[4096];
    while (const size_t n = fread(buffer, 1, sizeof buffer, child)) output.append(buffer, n);
    pclose(child);
    const bool asan = output.find("ERROR: AddressSanitizer") != output.npos;
    const std::string got = asan ? "asan" : output.substr(0, output.find(':'));
    const std::string want = simt::under_asan() ? fault.asan : fault.plain;
    CHECK(got == want || want == "?", "%s: noticed by %s, expected %s:\n%.600s", fault.name,
          got.c_str(), want.c_str(), output.c_str());
  }
}
