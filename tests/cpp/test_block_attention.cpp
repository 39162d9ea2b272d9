// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention_case.h"

using namespace check;
using dlm::BFloat16;
using dlm::Float16;
using Shape = AttentionShape;

namespace {

using dlm::cuda::AttendForm;

template <class T>
void check_case(AttentionCase<T>& c, AttendForm form) {
  CHECK(!dlm::cuda::why_not_attend(c.p), "refused: %s", dlm::cuda::why_not_attend(c.p));
  c.start(form);
  const std::string wrong = c.wrong();
  CHECK(wrong.empty(), "%s", wrong.c_str());
}
template <class T>
void check_case(AttentionCase<T>& c) {
  check_case(c, dlm::cuda::form_of(c.p));
}
template <class T>
void check_case(const Shape& shape, uint64_t seed) {
  AttentionCase<T> c(shape, seed);
  check_case(c);
}

// Every kernel of few rows: element type and head dimension.
template <class Run>
void for_each_kernel(const Run& run) {
  for (const int D : {64, 128, 256, 512}) run(BFloat16{}, D), run(Float16{}, D);
  for (const int D : {32, 64, 128, 256, 512}) run(float{}, D);
}
// Heads that are padded to one of these.
template <class Run>
void for_each_padded_head(const Run& run) {
  for (const int D : {8, 72, 80, 96, 112, 192, 320}) run(BFloat16{}, D);
  for (const int D : {4, 36, 80, 192, 260}) run(float{}, D);
}
// And of many, which a test must ask for: only large requests are attended by them.
template <class Run>
void for_each_wide_kernel(const Run& run) {
  for (const int D : {64, 128, 256}) run(BFloat16{}, D), run(Float16{}, D);
  for (const int D : {24, 80, 192}) run(BFloat16{}, D);
}

}  // namespace

TEST(every_kernel_in_every_mode) {
  uint64_t seed = 0;
  for_each_kernel([&]<class T>(T, int64_t D) {
    for (int mode = 0; mode < Shape::kModes; ++mode) {
      if (++seed % 2) {
        check_case<T>({.B = 2, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .mode = mode}, seed);
      } else {
        check_case<T>(
            {.B = 1, .Q = 21, .S = 70, .H = 2, .G = 1, .D = D, .mode = mode, .scattered = true}, seed);
      }
    }
  });
}

TEST(padded_heads) {
  uint64_t seed = 30;
  for_each_padded_head([&]<class T>(T, int64_t D) {
    for (const int mode : {Shape::kRanges, Shape::kCausal}) {
      check_case<T>({.B = 2, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .mode = mode, .infinite = true},
                    ++seed);
    }
    check_case<T>({.B = 1, .Q = 2, .S = 300, .H = 1, .G = 1, .D = D}, ++seed);
  });
}

TEST(every_wide_kernel_in_every_mode) {
  uint64_t seed = 50;
  for_each_wide_kernel([&]<class T>(T, int64_t D) {
    for (const int mode :
         {Shape::kFull, Shape::kRanges, Shape::kCausal, Shape::kBlockCausal, Shape::kOrder,
          Shape::kWindow}) {
      AttentionCase<T> c({.B = 1, .Q = 90, .S = 140, .H = 2, .G = 1, .D = D, .mode = mode,
                          .scattered = mode % 2 == 1},
                         ++seed);
      check_case(c, AttendForm::kWide);
    }
  });
}

TEST(cache_rows) {
  uint64_t seed = 70;
  for_each_kernel([&]<class T>(T, int64_t D) {
    check_case<T>({.B = 3, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .moved = true}, ++seed);
  });
  for_each_wide_kernel([&]<class T>(T, int64_t D) {
    AttentionCase<T> c({.B = 3, .Q = 40, .S = 60, .H = 1, .G = 1, .D = D, .mode = Shape::kCausal,
                        .moved = true, .infinite = true},
                       ++seed);
    check_case(c, AttendForm::kWide);
  });
  check_case<BFloat16>({.B = 2, .Q = 4, .S = 1100, .H = 2, .G = 1, .D = 64, .moved = true}, ++seed);
}

// New rows that are not the queries', or that some queries do not see.
TEST(new_rows_and_who_sees_them) {
  uint64_t seed = 80;
  for_each_kernel([&]<class T>(T, int64_t D) {
    const int mode = int(++seed % Shape::kModes);
    check_case<T>({.B = 2, .Q = 5, .S = 75, .H = 4, .G = 2, .D = D, .mode = mode, .K = 13}, seed);
    check_case<T>({.B = 3, .Q = 21, .S = 90, .H = 2, .G = 1, .D = D, .mode = mode,
                   .moved = true, .infinite = true, .hides = true},
                  seed);
    check_case<T>({.B = 2, .Q = 9, .S = 90, .H = 2, .G = 1, .D = D, .mode = mode,
                   .infinite = true, .shift = 7, .K = 40, .hides = true},
                  seed);
  });
  for_each_wide_kernel([&]<class T>(T, int64_t D) {
    for (const int mode : {Shape::kFull, Shape::kRanges, Shape::kOrder}) {
      AttentionCase<T> c({.B = 1, .Q = 90, .S = 140, .H = 2, .G = 1, .D = D, .mode = mode,
                          .infinite = true, .K = 70, .hides = true},
                         ++seed);
      check_case(c, AttendForm::kWide);
    }
  });
  // Splits; claims; no query at all.
  check_case<BFloat16>({.Q = 40, .S = 1100, .H = 2, .G = 1, .D = 64, .hides = true}, ++seed);
  check_case<BFloat16>({.Q = 4, .S = 900, .H = 2, .G = 1, .D = 64, .K = 600, .hides = true}, ++seed);
  check_case<float>({.Q = 0, .S = 40, .H = 2, .G = 1, .D = 32, .K = 9}, ++seed);
  check_case<BFloat16>({.Q = 0, .S = 40, .H = 2, .G = 1, .D = 64, .K = 9, .hides = true}, ++seed);
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
  for_each_wide_kernel([&]<class T>(T, int64_t D) {
    AttentionCase<T> c(
        {.B = 1, .Q = 140, .S = 150, .H = 1, .G = 1, .D = D, .mode = Shape::kCausal, .infinite = true},
        ++seed);
    check_case(c, AttendForm::kWide);
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
    CHECK(dlm::cuda::attend_params(c.p, nullptr).spread, "%d slots are not split", int(shape.S));
    check_case(c);
  }
  for (const int64_t D : {128, 192, 512}) {
    check_case<Float16>({.B = 1, .Q = 2, .S = 1030, .H = 1, .G = 1, .D = D}, ++seed);
    check_case<float>({.B = 1, .Q = 2, .S = 530, .H = 1, .G = 1, .D = D}, ++seed);
  }
  check_case<float>({.B = 1, .Q = 2, .S = 1030, .H = 1, .G = 1, .D = 32}, ++seed);
}

// A block that runs all splits gives the bits of blocks that share them.
TEST(who_runs_a_split_does_not_matter) {
  uint64_t seed = 450;
  for_each_kernel([&]<class T>(T, int64_t D) {
    for (const int mode : {Shape::kRanges, Shape::kWindow}) {
      if (mode == Shape::kWindow && D != 64) continue;
      AttentionCase<T> c(
          {.B = 1, .Q = 9, .S = 800, .H = 2, .G = 1, .D = D, .mode = mode, .scattered = true}, ++seed);
      dlm::cuda::AttendParams p = dlm::cuda::attend_params(c.p, c.workspace.data());
      CHECK(p.spread && p.splits == 4, "%d splits", int(p.splits));
      check_case(c);
      const std::vector<T> out(c.out.begin(), c.out.end());
      const std::vector<float> lse(c.lse.begin(), c.lse.end());
      std::fill(c.out.begin(), c.out.end(), dlm::from_float<T>(NAN));
      p.spread = false;
      run(dlm::cuda::start_block_attention(p, c.workspace.data(), nullptr));
      CHECK(!std::memcmp(out.data(), c.out.data(), out.size() * sizeof(T)), "out, D %d", int(D));
      CHECK(!std::memcmp(lse.data(), c.lse.data(), lse.size() * 4), "lse, D %d", int(D));
    }
  });
}

// Of rows that name one slot the last one stays, however many rows there are.
TEST(a_slot_written_twice) {
  check_case<BFloat16>({.B = 1, .Q = 40, .S = 50, .H = 1, .G = 1, .twice = true}, 500);
  check_case<BFloat16>({.B = 2, .Q = 600, .S = 640, .H = 1, .G = 1, .D = 8, .twice = true}, 501);
  check_case<float>({.B = 1, .Q = 520, .S = 530, .H = 1, .G = 1, .D = 4, .scattered = true, .twice = true}, 502);
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
    AttentionCase<BFloat16> wide(
        {.B = 1, .Q = 140, .S = 140, .H = 1, .G = 1, .mode = Shape::kCausal}, 701);
    check_case(wide, AttendForm::kWide);
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
  for (const int64_t D : {64, 80, 128, 256, 512}) {
    const Shape shape{.B = 1, .Q = 4, .S = 128, .H = 7, .G = 1, .D = D, .fresh = false, .gap = 2};
    AttentionCase<BFloat16> c(shape, 800);
    const simt::Counters n = counted(c);
    // Two blocks share the columns of v of a head of 512, and each reads q and k.
    const int64_t again = D == 512 ? shape.Q * shape.H + shape.S : 0;
    const auto bytes = uint64_t((2 * shape.Q * shape.H + 2 * shape.S + again) * D * 2);
    CHECK(n.gmem_sectors * 32 == bytes, "D %d: %zu bytes, expected %zu", int(D),
          size_t(n.gmem_sectors * 32), size_t(bytes));
    CHECK(n.smem_requests > 0 && n.smem_conflicts == 0, "D %d: %zu conflicts in %zu requests",
          int(D), size_t(n.smem_conflicts), size_t(n.smem_requests));
  }
  // What nobody sees is not read.
  AttentionCase<BFloat16> c(
      {.B = 1, .Q = 1, .S = 250, .H = 1, .G = 1, .mode = Shape::kWindow, .fresh = false, .gap = 2},
      801);
  const uint64_t read = counted(c).gmem_sectors * 32;
  const auto most = uint64_t((2 + 2 * (c.p.window_left + 1 + c.p.window_right)) * 64 * 2);
  CHECK(read <= most, "%zu bytes are read, the window holds %zu", size_t(read), size_t(most));
}
#endif
