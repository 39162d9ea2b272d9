// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention_case.h"

using namespace check;
using dlm::BFloat16;
using dlm::Float16;
using Shape = AttentionShape;

namespace {

template <class T>
void check_case(AttentionCase<T>& c) {
  CHECK(!dlm::cuda::why_not_attend(c.p), "refused: %s", dlm::cuda::why_not_attend(c.p));
  run(dlm::cuda::start_block_attention(c.p, c.workspace.data(), nullptr));
  const std::string wrong = c.wrong();
  CHECK(wrong.empty(), "%s", wrong.c_str());
}
template <class T>
void check_case(const Shape& shape, uint64_t seed) {
  AttentionCase<T> c(shape, seed);
  check_case(c);
}

// Every kernel: element type and head dimension, few rows and many.
template <class Run>
void for_each_kernel(const Run& run) {
  run(BFloat16{}, 64), run(BFloat16{}, 128), run(BFloat16{}, 256);
  run(Float16{}, 64), run(Float16{}, 128), run(Float16{}, 256);
  run(float{}, 32), run(float{}, 64), run(float{}, 128), run(float{}, 256);
}

}  // namespace

TEST(every_kernel_in_every_mode) {
  uint64_t seed = 0;
  for_each_kernel([&]<class T>(T, int64_t D) {
    for (int mode = 0; mode < Shape::kModes; ++mode) {
      check_case<T>({.B = 2, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .mode = mode}, ++seed);
      check_case<T>(
          {.B = 1, .Q = 21, .S = 70, .H = 2, .G = 1, .D = D, .mode = mode, .scattered = true},
          ++seed);
    }
  });
}

TEST(shapes) {
  uint64_t seed = 100;
  for (const auto& [Q, H, G] : {std::tuple{1, 1, 1},
                                {1, 7, 1},
                                {4, 14, 2},
                                {9, 7, 1},
                                {32, 1, 1},
                                {33, 1, 1},
                                {64, 2, 1},
                                {130, 1, 1},
                                {3, 3, 3},
                                {3, 10, 10},
                                {2, 34, 17}}) {
    for (const int64_t S : {Q, Q + 1, 64, 131}) {
      if (S < Q) continue;
      check_case<BFloat16>({.Q = Q, .S = S, .H = H, .G = G, .D = 64}, ++seed);
      check_case<float>({.Q = Q, .S = S, .H = H, .G = G, .D = 32, .mode = Shape::kCausal}, ++seed);
    }
  }
}

TEST(what_is_not_seen_is_not_multiplied) {
  uint64_t seed = 200;
  for_each_kernel([&]<class T>(T, int64_t D) {
    for (const int mode : {Shape::kCausal, Shape::kOrder}) {
      check_case<T>({.Q = 9, .S = 40, .D = D, .mode = mode, .infinite = true}, ++seed);
    }
  });
}

TEST(nothing_to_see) {
  AttentionCase<BFloat16> c({.mode = Shape::kRanges}, 300);
  for (auto& x : c.ranges) x = 7;
  check_case(c);
  AttentionCase<float> d({.S = 0, .D = 32, .fresh = false, .scattered = true}, 301);
  for (auto& x : d.slots) x = -1;
  check_case(d);
}

TEST(slots_split) {
  uint64_t seed = 400;
  for (const int mode : {Shape::kFull, Shape::kRanges, Shape::kBlockCausal, Shape::kWindow}) {
    const Shape shape{.B = 1, .Q = 4, .S = 1100, .H = 2, .G = 1, .D = 64, .mode = mode};
    AttentionCase<BFloat16> c(shape, ++seed);
    CHECK(c.workspace.size() > 0, "%d slots are not split", int(shape.S));
    check_case(c);
  }
  check_case<float>({.B = 1, .Q = 2, .S = 1030, .H = 1, .G = 1, .D = 32}, ++seed);
  check_case<Float16>({.B = 1, .Q = 2, .S = 1030, .H = 1, .G = 1, .D = 128}, ++seed);
}

// Of rows that name one slot the last one stays.
TEST(a_slot_written_twice) {
  check_case<BFloat16>({.B = 1, .Q = 40, .S = 50, .H = 1, .G = 1, .twice = true}, 500);
}

// A request alone, among others, and further right in a larger cache: the same bits.
TEST(requests_do_not_depend_on_their_place) {
  const Shape shape{.B = 1, .Q = 6, .S = 600, .H = 2, .G = 1, .D = 64, .mode = Shape::kRanges};
  AttentionCase<BFloat16> alone(shape, 600);
  run(dlm::cuda::start_block_attention(alone.p, alone.workspace.data(), nullptr));
  for (const int64_t shift : {0, 37}) {
    Shape larger = shape;
    larger.B = 3, larger.S = shape.S + shift, larger.shift = shift;
    AttentionCase<BFloat16> c(larger, 601);
    const int64_t b = 2;
    const auto copy = [&](const auto& from, const int64_t* from_stride, auto& to,
                          const int64_t* to_stride, int64_t rows, int64_t heads, int64_t first) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          std::copy_n(&from[c.at(from_stride, 0, i, h)], shape.D,
                      &to[c.at(to_stride, b, first + i, h)]);
        }
      }
    };
    const auto &p = alone.p, &wide = c.p;
    copy(alone.q, p.q_stride, c.q, wide.q_stride, shape.Q, shape.H, 0);
    copy(alone.k_new, p.k_new_stride, c.k_new, wide.k_new_stride, shape.Q, shape.G, 0);
    copy(alone.v_new, p.v_new_stride, c.v_new, wide.v_new_stride, shape.Q, shape.G, 0);
    copy(alone.k_expected, p.k_cache_stride, c.k_cache, wide.k_cache_stride, shape.S, shape.G,
         shift);
    copy(alone.v_expected, p.v_cache_stride, c.v_cache, wide.v_cache_stride, shape.S, shape.G,
         shift);
    c.p.scale = p.scale;
    for (size_t i = 0; i < alone.slots.size(); ++i) {
      c.slots[size_t(b) * alone.slots.size() + i] = alone.slots[i] + int32_t(shift);
    }
    for (size_t i = 0; i < alone.ranges.size(); ++i) {
      c.ranges[size_t(b) * alone.ranges.size() + i] = alone.ranges[i] + int32_t(shift);
    }
    run(dlm::cuda::start_block_attention(c.p, c.workspace.data(), nullptr));
    const size_t n = alone.out.size(), rows = alone.lse.size();
    CHECK(!std::memcmp(alone.out.data(), c.out.data() + size_t(b) * n, n * 2), "out, shift %d",
          int(shift));
    CHECK(!std::memcmp(alone.lse.data(), c.lse.data() + size_t(b) * rows, rows * 4),
          "lse, shift %d", int(shift));
  }
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    check_case<BFloat16>({.B = 1, .Q = 5, .S = 140, .H = 2, .G = 1, .mode = Shape::kRanges}, 700);
    check_case<BFloat16>({.B = 1, .Q = 70, .S = 140, .H = 1, .G = 1, .mode = Shape::kCausal}, 701);
    check_case<float>({.B = 1, .Q = 5, .S = 100, .H = 2, .G = 1, .D = 32}, 702);
    check_case<BFloat16>({.B = 1, .Q = 2, .S = 530, .H = 1, .G = 1}, 703);
  });
}

#ifdef DLM_SIMT
// K and V once for all rows of their head, q once; whole sectors; no bank twice at a time.
TEST(every_byte_is_read_once) {
  const auto counted = [](AttentionCase<BFloat16>& c) {
    simt::counters() = {};
    check_case(c);
    return simt::counters();
  };
  for (const int64_t D : {64, 128, 256}) {
    const Shape shape{.B = 1, .Q = 4, .S = 128, .H = 7, .G = 1, .D = D, .fresh = false, .gap = 2};
    AttentionCase<BFloat16> c(shape, 800);
    const simt::Counters n = counted(c);
    const auto bytes = uint64_t((2 * shape.Q * shape.H + 2 * shape.S) * D * 2);
    CHECK(n.gmem_sectors * 32 == bytes, "D %d: %zu bytes, expected %zu", int(D),
          size_t(n.gmem_sectors * 32), size_t(bytes));
    CHECK(n.smem_requests > 0 && n.smem_conflicts == 0, "D %d: %zu conflicts in %zu requests",
          int(D), size_t(n.smem_conflicts), size_t(n.smem_requests));
  }
  // What nobody sees is not read.
  AttentionCase<BFloat16> c(
      {.B = 1, .Q = 1, .S = 500, .H = 1, .G = 1, .mode = Shape::kWindow, .fresh = false, .gap = 2},
      801);
  const uint64_t read = counted(c).gmem_sectors * 32;
  const auto most = uint64_t((2 + 2 * (c.p.window_left + 1 + c.p.window_right)) * 64 * 2);
  CHECK(read <= most, "%zu bytes are read, the window holds %zu", size_t(read), size_t(most));
}
#endif
