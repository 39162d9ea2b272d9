// SPDX-License-Identifier: Apache-2.0
// lm_head_confidence's AMX kernel, as the library compiles it, run on the model of amx/ (or on a
// processor that has AMX), against float64 and against the AVX-512 kernel.
#include <cmath>
#include <cstring>

#include "amx/trap.h"
#include "check.h"
#include "cpu/lm_head_confidence.h"
#include "reference.h"
#include "simt/fiber.h"

using namespace check;
using amx::Slip;
using dlm::BFloat16, dlm::cpu::LmHeadKernels;
using dlm::cpu::kHeadLanes;

namespace {

const LmHeadKernels kAmx = dlm::cpu::amx::lm_head_confidence(dlm::DType::kBFloat16);
const LmHeadKernels kOther = dlm::cpu::avx512bf16::lm_head_confidence(dlm::DType::kBFloat16);
constexpr int64_t kGroup = 2 * kHeadLanes;

// Rows and tokens of D elements, tokens `stride` apart. What lies between tokens is NaN, and so is
// what is to be written.
struct HeadTiles {
  int64_t rows, tokens, D, stride, out_stride;
  bool exact;  // small whole numbers: the logits are the same in every order of addition
  Array<BFloat16> hidden, weight, out;

  HeadTiles(int64_t rows_, int64_t tokens_, int64_t D_, int64_t gap, bool exact_, uint64_t seed)
      : rows(rows_),
        tokens(tokens_),
        D(D_),
        stride(D_ + gap),
        out_stride(tokens_ + 3),
        exact(exact_),
        hidden(size_t(rows * D)),
        weight(size_t((tokens - 1) * stride + D), dlm::from_float<BFloat16>(NAN)),
        out(size_t(rows * out_stride), dlm::from_float<BFloat16>(NAN)) {
    Random random(seed);
    const auto number = [&] {
      const float whole = float(random.below(9)) - 4, real = float(random.normal());
      return dlm::from_float<BFloat16>(exact ? whole : real);
    };
    for (auto& x : hidden) x = number();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < D; ++d) weight[size_t(t * stride + d)] = number();
    }
  }

  // Rows [first, first + count), with some kernels; what the model found wrong, or "".
  std::string multiply(const LmHeadKernels& kernels, int64_t first, int64_t count, BFloat16* to,
                       Slip slip = Slip::kNone) {
    const int64_t words = kernels.words(D), lanes = (count + kHeadLanes - 1) / kHeadLanes;
    Array<uint32_t> packed(size_t(lanes * kHeadLanes * words), 0xffffffffu);
    for (int64_t r = 0; r < count; r += kGroup) {
      const void* from[kGroup] = {};
      const int64_t n = std::min(kGroup, count - r);
      for (int64_t i = 0; i < n; ++i) from[i] = hidden.data() + (first + r + i) * D;
      kernels.pack(from, D, n > kHeadLanes ? kGroup : kHeadLanes, packed.data() + r * words);
    }
    return amx::run(
        [&] {
          for (int64_t t = 0; t < tokens; t += kernels.tokens) {
            kernels.multiply(packed.data(), count, weight.data() + t * stride, stride,
                             std::min(kernels.tokens, tokens - t), D, to + t, out_stride);
          }
        },
        slip);
  }

  // The first difference from the definition, and from the AVX-512 kernel.
  std::string wrong(Slip slip = Slip::kNone) {
    const std::string refused = multiply(kAmx, 0, rows, out.data(), slip);
    if (!refused.empty()) return "model: " + refused;
    Array<BFloat16> other(out.size(), dlm::from_float<BFloat16>(NAN));
    multiply(kOther, 0, rows, other.data());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = 0; t < out_stride; ++t) {
        const size_t at = size_t(r * out_stride + t);
        const double got = dlm::to_float(out[at]);
        if (t >= tokens) {
          if (!std::isnan(got)) return "value: more than the tokens is written";
          continue;
        }
        double want = 0, size = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double x = double(dlm::to_float(hidden[size_t(r * D + d)])) *
                           dlm::to_float(weight[size_t(t * stride + d)]);
          want += x, size += std::fabs(x);
        }
        // A rounding to bf16, and of the sum.
        const double most = 0x1p-8 * std::fabs(want) + (exact ? 0 : 1e-5 * size);
        char text[120];
        snprintf(text, sizeof text, "value: [%d, %d] is %.9g, expected %.9g", int(r), int(t), got,
                 want);
        if (!(std::fabs(got - want) <= most)) return text;
        if (exact && out[at].bits != other[at].bits)
          return "value: exact logits are not as with AVX-512";
      }
    }
    return "";
  }
};

void check_tiles(int64_t rows, int64_t tokens, int64_t D, int64_t gap, bool exact, uint64_t seed) {
  HeadTiles tiles(rows, tokens, D, gap, exact, seed);
  const std::string wrong = tiles.wrong();
  CHECK(wrong.empty(), "%d rows, %d tokens, D %d: %s", int(rows), int(tokens), int(D),
        wrong.c_str());
}

}  // namespace

TEST(every_shape) {
  uint64_t seed = 0;
  for (const int64_t rows : {1, 15, 16, 17, 32, 33, 48, 49, 65, 128})
    check_tiles(rows, 20, 72, 0, true, ++seed);
  for (const int64_t tokens : {1, 2, 15, 16, 17, 33, 256, 257})
    check_tiles(5, tokens, 64, tokens % 3, true, ++seed);
  for (const int64_t D : {1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 511, 512, 513, 544, 1060}) {
    check_tiles(3, 18, D, 0, true, ++seed);
    check_tiles(20, 16, D, 1 + D % 5, false, ++seed);
  }
}

TEST(no_elements) {
  HeadTiles tiles(2, 17, 1, 0, true, 1);
  tiles.D = 0;
  const std::string refused = tiles.multiply(kAmx, 0, 2, tiles.out.data());
  CHECK(refused.empty(), "%s", refused.c_str());
  for (int64_t t = 0; t < 17; ++t) CHECK(tiles.out[size_t(t)].bits == 0, "token %d", int(t));
}

// A row's bits do not depend on the rows beside it.
TEST(rows_do_not_depend_on_their_number) {
  HeadTiles tiles(70, 40, 600, 0, false, 7);
  CHECK(tiles.multiply(kAmx, 0, 70, tiles.out.data()).empty(), "all rows");
  for (const auto& [first, count] : {std::pair{0, 1}, {33, 1}, {69, 1}, {10, 20}, {1, 40}}) {
    Array<BFloat16> some(size_t(count * tiles.out_stride), dlm::from_float<BFloat16>(NAN));
    CHECK(tiles.multiply(kAmx, first, count, some.data()).empty(), "rows from %d on", first);
    for (int64_t r = 0; r < count; ++r) {
      const auto* whole = tiles.out.data() + (first + r) * tiles.out_stride;
      CHECK(!std::memcmp(whole, some.data() + r * tiles.out_stride, size_t(tiles.tokens) * 2),
            "row %d of %d from %d on", int(r), count, first);
    }
  }
}

// NaN and infinities touch their own rows and tokens alone, whatever lies beside them in a tile.
TEST(special_values_stay_where_they_are) {
  HeadTiles tiles(5, 18, 40, 0, true, 8), clean(5, 18, 40, 0, true, 8);
  tiles.hidden[2 * 40 + 7] = dlm::from_float<BFloat16>(NAN);
  tiles.weight[17 * 40 + 39] = dlm::from_float<BFloat16>(INFINITY);
  tiles.hidden[0 * 40 + 39] = dlm::from_float<BFloat16>(1);
  clean.hidden[0 * 40 + 39] = dlm::from_float<BFloat16>(1);
  CHECK(tiles.multiply(kAmx, 0, 5, tiles.out.data()).empty(), "special");
  CHECK(clean.multiply(kAmx, 0, 5, clean.out.data()).empty(), "clean");
  for (int64_t r = 0; r < 5; ++r) {
    for (int64_t t = 0; t < 17; ++t) {
      const size_t at = size_t(r * tiles.out_stride + t);
      if (r == 2) CHECK(std::isnan(dlm::to_float(tiles.out[at])), "[2, %d]", int(t));
      if (r != 2) CHECK(tiles.out[at].bits == clean.out[at].bits, "[%d, %d]", int(r), int(t));
    }
  }
  CHECK(dlm::to_float(tiles.out[17]) == INFINITY, "[0, 17]");
}

// As many products of tiles as there are, and no more: of 16 rows, 16 tokens and 32 elements each.
TEST(work_done) {
  HeadTiles tiles(40, 48, 1088, 0, false, 9);
  CHECK(tiles.multiply(kAmx, 0, 40, tiles.out.data()).empty(), "40 rows");
  CHECK(amx::on_processor() || amx::products() == 3 * 3 * 34, "%d products", int(amx::products()));
}

// What a kernel with a wrong instruction would do is noticed. (Sums of even and of odd blocks may
// change places.)
TEST(slips_are_noticed) {
  uint64_t seed = 100;
  const std::pair<Slip, const char*> slips[] = {
      {Slip::kNone, ""},
      {Slip::kNoConfiguration, "model"},
      {Slip::kNoRelease, "model"},
      {Slip::kNoZero, "value"},
      {Slip::kNoStore, "value"},
      {Slip::kNarrowConfiguration, "model"},
      {Slip::kStridedLoad, "value"},
      {Slip::kUnstridedStore, "value"},
      {Slip::kSwappedOperands, "value"},
  };
  for (const auto& [slip, expected] : slips) {
    if (amx::on_processor() && slip != Slip::kNone) continue;        // a processor makes none
    if (simt::under_asan() && slip == Slip::kStridedLoad) continue;  // ends the process: an overrun
    HeadTiles tiles(20, 33, 96, 32, true, ++seed);
    const std::string wrong = tiles.wrong(slip), by = wrong.substr(0, wrong.find(':'));
    CHECK(by == expected, "slip %d: noticed by '%s', expected '%s'", int(slip), wrong.c_str(),
          expected);
  }
}
