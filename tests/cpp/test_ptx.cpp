// SPDX-License-Identifier: Apache-2.0
// Every function of cuda/ptx.cuh against a definition written apart from the model: where the model
// goes from a lane's register to a matrix element, these go from the element to the lane.
#include <cmath>
#include <cstring>

#include "check.h"
#include "golden.h"
#include "kernels/wrappers.cuh"
#include "reference.h"

using namespace check;
using namespace dlm::cuda;

namespace {

using Words = Array<uint32_t>;
using Agree = std::function<bool(uint32_t, uint32_t)>;
bool same(uint32_t a, uint32_t b) { return a == b; }

// Runs the kernel under every schedule, compares with `want`, at the end with golden data.
void check_words(const char* name, void (*kernel)(WrapperParams), const Words& in,
                 const std::vector<uint32_t>& want, const Agree& agree = same, dim3 grid = 1,
                 int threads = 32, size_t smem = 4096, int n = 0, bool resident_together = false) {
  std::vector<uint32_t> last;
  for_each_schedule([&] {
#ifdef DLM_SIMT
    const simt::Options before = simt::options();
    if (resident_together) simt::options().resident_blocks = grid.x;
#endif
    Words out(want.size(), 0xdeadbeef), scratch(4096, 0);
    run(launch(kernel, grid, dim3(unsigned(threads)), smem, nullptr,
               WrapperParams{in.data(), out.data(), scratch.data(), n}));
    size_t wrong = 0, first = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      if (!agree(out[i], want[i]) && wrong++ == 0) first = i;
    }
    CHECK(wrong == 0, "%s: %zu of %zu words wrong; word %zu is %08x, expected %08x", name, wrong,
          want.size(), first, out[first], want[first]);
    last.assign(out.begin(), out.end());
#ifdef DLM_SIMT
    simt::options() = before;
#endif
  });
  (void)resident_together;
  if (!failed()) golden::compare(name, in.data(), in.size(), last.data(), last.size(), agree);
}

Agree floats_agree(double tolerance) {
  return [=](uint32_t a, uint32_t b) {
    return close(dlm::bits_to_float(a), dlm::bits_to_float(b), tolerance);
  };
}

template <int count, bool trans>
void check_ldmatrix(const char* name) {
  Words in(32 + 128);
  Random random(count);
  for (uint32_t i = 0; i < 32; ++i) in[i] = i;
  for (uint32_t i = 31; i > 0; --i) std::swap(in[i], in[random.below(i + 1)]);  // rows in any order
  for (int i = 0; i < 128; ++i) in[32 + i] = random.word();
  std::vector<uint32_t> want(32 * count);
  for (int m = 0; m < count; ++m) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const uint32_t address_lane = in[m * 8 + row];
        const uint32_t element =
            in[32 + address_lane * 4 + column / 2] >> (column % 2 * 16) & 0xffff;
        const int i = trans ? column : row, j = trans ? row : column;
        want[(i * 4 + j / 2) * count + m] |= element << (j % 2 * 16);
      }
    }
  }
  check_words(name, ldmatrix_kernel<count, trans>, in, want);
}

template <bool bf16>
void check_mma(const char* name) {
  Words in(320);
  Random random(16);
  const auto element = [&] {
    const float x = float(random.normal());
    return uint32_t(bf16 ? dlm::from_float<dlm::BFloat16>(x).bits
                         : dlm::from_float<dlm::Float16>(x).bits);
  };
  const auto value = [](uint32_t bits) {
    return double(bf16 ? dlm::to_float(dlm::BFloat16{uint16_t(bits)})
                       : dlm::to_float(dlm::Float16{uint16_t(bits)}));
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 6; ++i) {
      const uint32_t low = element();
      in[lane * 10 + i] = low | element() << 16;
    }
    for (int i = 6; i < 10; ++i) in[lane * 10 + i] = dlm::float_to_bits(float(random.normal()));
  }
  // Which lane, word and half holds an element of a (16 x 16, row-major) and of b (16 x 8,
  // column-major).
  const auto a = [&](int i, int k) {
    return value(in[(i % 8 * 4 + k % 8 / 2) * 10 + k / 8 * 2 + i / 8] >> (k % 2 * 16) & 0xffff);
  };
  const auto b = [&](int k, int j) {
    return value(in[(j * 4 + k % 8 / 2) * 10 + 4 + k / 8] >> (k % 2 * 16) & 0xffff);
  };
  std::vector<uint32_t> want(128);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      const int lane = i % 8 * 4 + j / 2, word = i / 8 * 2 + j % 2;
      double sum = dlm::bits_to_float(in[lane * 10 + 6 + word]);
      for (int k = 0; k < 16; ++k) sum += a(i, k) * b(k, j);
      want[lane * 4 + word] = dlm::float_to_bits(float(sum));
    }
  }
  // Tensor cores may truncate each product's alignment: a few units of float at the largest term.
  check_words(name, mma_kernel<bf16>, in, want, floats_agree(4e-6));
}

}  // namespace

TEST(ldmatrix_layout) {
  check_ldmatrix<1, false>("ldmatrix_x1");
  check_ldmatrix<2, false>("ldmatrix_x2");
  check_ldmatrix<4, false>("ldmatrix_x4");
  check_ldmatrix<1, true>("ldmatrix_x1_trans");
  check_ldmatrix<2, true>("ldmatrix_x2_trans");
  check_ldmatrix<4, true>("ldmatrix_x4_trans");
}

TEST(mma) {
  check_mma<true>("mma_bf16");
  check_mma<false>("mma_f16");
}

TEST(cp_async) {
  Words in(32 + 32 * 12);
  Random random(3);
  std::vector<uint32_t> want(32 * 12);
  for (int lane = 0; lane < 32; ++lane) {
    in[lane] = random.below(8);
    for (int i = 0; i < 12; ++i) {
      const uint32_t word = in[32 + lane * 12 + i] = random.word();
      want[lane * 12 + i] = in[lane] >> i / 4 & 1 ? word : 0;
    }
  }
  check_words("cp_async", cp_async_kernel, in, want);
}

TEST(copy_16) {
  Words in(256);
  Random random(4);
  for (auto& x : in) x = random.word();
  std::vector<uint32_t> want(256);
  for (int i = 0; i < 128; ++i) want[i] = in[(31 - i / 4) * 4 + i % 4], want[128 + i] = in[128 + i];
  check_words("copy_16", copy_16_kernel, in, want);
}

TEST(arithmetic) {
  std::vector<float> values = {0.0f,     -0.0f,     1.0f,    -1.0f,   2.0f,   0.5f,
                               INFINITY, -INFINITY, NAN,     127.5f,  128.5f, -125.5f,
                               -126.5f,  -149.0f,   -200.0f, 1e-40f,  65504,  65520,
                               6.1e-05f, 5.96e-8f,  2.9e-8f, 3.4e38f, 1e-38f, -1e-40f};
  Random random(5);
  while (values.size() < 256)
    values.push_back(float(random.normal() * std::exp2(random.uniform(-20, 6))));
  const int n = int(values.size());
  Words in(values.size());
  for (int i = 0; i < n; ++i) in[i] = dlm::float_to_bits(values[i]);

  const auto flushed = [](float x) {
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
  };
  const auto bf16 = [](float x) {
    return uint32_t(x != x ? 0x7fff : dlm::from_float<dlm::BFloat16>(x).bits);
  };
  const auto f16 = [](float x) {
    return uint32_t(x != x ? 0x7fff : dlm::from_float<dlm::Float16>(x).bits);
  };
  // Halves of two words, compared as integers that grow with the value.
  const auto larger = [](uint32_t a, uint32_t b, int shift, uint32_t infinity) {
    const auto order = [](uint32_t h) { return h & 0x8000 ? -int(h & 0x7fff) - 1 : int(h); };
    a = a >> shift & 0xffff, b = b >> shift & 0xffff;
    const bool nan = (a & 0x7fff) > infinity || (b & 0x7fff) > infinity;
    return (nan ? 0x7fff : order(a) > order(b) ? a : b) << shift;
  };
  std::vector<uint32_t> want(values.size() * 11);
  for (int i = 0; i < n; ++i) {
    const float x = values[i], y = values[i ^ 1];
    uint32_t* out = want.data() + i * 11;
    out[0] = dlm::float_to_bits(flushed(float(std::exp2(double(flushed(x))))));
    out[1] = dlm::float_to_bits(float(std::log2(double(flushed(x)))));
    out[2] = bf16(x) | bf16(y) << 16;
    out[3] = f16(x) | f16(y) << 16;
    out[4] = in[i] << 16;
    out[5] = in[i] & 0xffff0000u;
    out[6] = dlm::float_to_bits(dlm::to_float(dlm::Float16{uint16_t(in[i])}));
    out[7] = dlm::float_to_bits(dlm::to_float(dlm::Float16{uint16_t(in[i] >> 16)}));
    out[8] = dlm::float_to_bits(x != x || y != y ? NAN : std::fmax(x, y));
    if (x == 0 && y == 0) out[8] = in[i] & in[i ^ 1];
    out[9] = larger(in[i], in[i ^ 1], 0, 0x7f80) | larger(in[i], in[i ^ 1], 16, 0x7f80);
    out[10] = larger(in[i], in[i ^ 1], 0, 0x7c00) | larger(in[i], in[i ^ 1], 16, 0x7c00);
  }
  // ex2 and lg2: 2^-21 relative (lg2 of a value near 1: 2^-22 absolute). The rest is exact, NaN for
  // NaN.
  const Agree agree = [](uint32_t got, uint32_t wanted) {
    const float a = dlm::bits_to_float(got), b = dlm::bits_to_float(wanted);
    if (got == wanted || (std::isnan(a) && std::isnan(b))) return true;
    return std::fabs(double(a) - b) <=
           std::fmax(0x1p-21 * std::fabs(double(b)), std::fabs(b) > 1e-3 ? 0x1p-22 : 0);
  };
  check_words("arithmetic", arithmetic_kernel, in, want, agree, 1, 32, 0, n);
}

TEST(last_block) {
  constexpr int kBlocks = 6, kWords = 40;
  Words in(kBlocks * kWords);
  Random random(6);
  std::vector<uint32_t> want;
  for (auto& x : in) want.push_back((x = random.word()) + 1);
  check_words("last_block", last_block_kernel, in, want, same, kBlocks, 32, 128, kWords);
}

TEST(message_between_blocks) {
  Words in(50);
  Random random(7);
  std::vector<uint32_t> want;
  for (auto& x : in) want.push_back((x = random.word()) * 3);
  check_words("message", message_kernel, in, want, same, 2, 32, 0, 50, true);
}

TEST(named_barriers) {
  constexpr int kRounds = 4;
  Words in(kRounds * 32);
  Random random(8);
  for (auto& x : in) x = random.word();
  std::vector<uint32_t> want(kRounds * 64);
  for (int i = 0; i < kRounds * 64; ++i) want[i] = in[i / 64 * 32 + 31 - i % 32];
  check_words("named_barriers", named_barrier_kernel, in, want, same, 1, 96, 128, kRounds);
}

TEST(warp_intrinsics) {
  Words in(32);
  Random random(9);
  for (auto& x : in) x = random.word() | 1u << random.below(32);
  std::vector<uint32_t> want(32 * 20);
  const auto fold = [&](auto combine) {
    uint32_t all = in[0];
    for (int i = 1; i < 32; ++i) all = combine(all, in[i]);
    return all;
  };
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* out = want.data() + lane * 20;
    out[0] = in[lane ^ 5];
    out[1] = in[lane >= 3 ? lane - 3 : lane];
    out[2] = in[lane + 7 < 32 ? lane + 7 : lane];
    out[3] = in[in[lane] & 31];
    out[4] = in[lane ^ 3];
    out[5] = in[lane % 16 >= 2 ? lane - 2 : lane];
    out[6] = in[lane % 4 < 3 ? lane + 1 : lane];
    out[7] = in[lane / 8 * 8 + 1];
    out[8] = in[lane ^ 16];
    for (int i = 0; i < 32; ++i) out[9] |= (in[i] & 1) << i;
    for (int i = 0; i < 32; ++i) out[10] |= in[i] % 64 == 0;
    out[11] = 1;
    out[12] = fold([](uint32_t a, uint32_t b) { return a + b; });
    out[13] = fold([](uint32_t a, uint32_t b) { return a < b ? a : b; });
    out[14] = fold([](uint32_t a, uint32_t b) { return a > b ? a : b; });
    out[15] = fold([](uint32_t a, uint32_t b) { return int(a) < int(b) ? a : b; });
    out[16] = fold([](uint32_t a, uint32_t b) { return a & b; });
    out[17] = fold([](uint32_t a, uint32_t b) { return a | b; });
    out[18] = fold([](uint32_t a, uint32_t b) { return a ^ b; });
    if (lane < 12) {
      out[19] = in[lane ^ 1];
      for (int i = 0; i < 12; ++i) out[19] += uint32_t(in[i] > 0x80000000u) << i;
    }
  }
  check_words("warp_intrinsics", warp_kernel, in, want);
}
