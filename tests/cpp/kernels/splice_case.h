// SPDX-License-Identifier: Apache-2.0
// Random canvases for splice_; what the CPU kernel makes of them is what the CUDA kernel must make,
// bit for bit.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/splice.h"
#include "cuda/splice.h"
#include "reference.h"

namespace check {

struct SpliceCase {
  enum With : unsigned {
    kInsert = 1,
    kRemove = 2,
    kLength = 4,
    kEnd = 8,  // not with kLength
    kState = 16,
    kRecords = 32,
    kMany = 64,     // many insertions: rows overflow
    kHostile = 128  // lengths beyond the canvas, negative counts
  };

  // All that a call writes.
  struct Canvas {
    Array<int64_t> tokens;
    Array<uint8_t> state;
    Array<int32_t> commit_step, length, source, info;
    Array<float> commit_confidence;

    Canvas(int64_t B, int64_t T)
        : tokens(size_t(B * T)),
          state(size_t(B * T)),
          commit_step(size_t(B * T)),
          length(size_t(B)),
          source(size_t(B * T), -77),
          info(size_t(B * dlm::kSpliceColumns), -77),
          commit_confidence(size_t(B * T)) {}
  };

  dlm::SpliceParams p{};
  Canvas got, expected;
  Array<int32_t> start, end, sound_end, insert, sound_insert;
  Array<uint8_t> remove;
  int64_t ends_per_value;

  SpliceCase(int64_t B, int64_t T, int64_t W, unsigned with, uint64_t random_seed)
      : got(B, T),
        expected(B, T),
        start(size_t(B)),
        end(size_t(B)),
        sound_end(size_t(B)),
        insert(size_t(B * W)),
        sound_insert(size_t(B * W)),
        remove(size_t(B * W)) {
    Random random(random_seed);
    const auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    const bool hostile = with & kHostile;
    for (int64_t b = 0; b < B; ++b) {
      const size_t i = size_t(b);
      start[i] = int32_t(below(8) ? below(T / 2 + 1) : below(T + 2) - 1);
      int64_t live = below(5) ? T - below(T / 2 + 1) : below(T + 1);
      got.length[i] = expected.length[i] = end[i] = sound_end[i] = int32_t(live);
      if (hostile && below(3) == 0) {
        const bool above = below(2);
        got.length[i] = end[i] = above ? int32_t(T + 1 + below(3)) : -int32_t(below(3)) - 1;
        expected.length[i] = sound_end[i] = above ? int32_t(T) : 0;
      }
      const int64_t rarity = below(3) ? 6 : 1;
      int64_t balance = 0;
      for (int64_t w = 0; w < W; ++w) {
        const size_t at = size_t(b * W + w);
        remove[at] = below(rarity) == 0;
        int64_t count = with & kMany ? below(5) : balance < 0 ? below(3) : 0;
        balance += count - remove[at];
        insert[at] = sound_insert[at] = int32_t(count);
        if (hostile && below(6) == 0) insert[at] = -int32_t(below(99)) - 1, sound_insert[at] = 0;
      }
      for (int64_t t = 0; t < T; ++t) {
        const size_t at = size_t(b * T + t);
        got.tokens[at] = below(below(2) ? 3 : 500);
        got.state[at] = uint8_t(below(4) ? below(256) & ~2 : below(256));
        got.commit_step[at] = int32_t(below(9)) - 1;
        got.commit_confidence[at] = float(below(9));
      }
    }
    std::copy(got.tokens.begin(), got.tokens.end(), expected.tokens.begin());
    std::copy(got.state.begin(), got.state.end(), expected.state.begin());
    std::copy(got.commit_step.begin(), got.commit_step.end(), expected.commit_step.begin());
    std::copy(got.commit_confidence.begin(), got.commit_confidence.end(),
              expected.commit_confidence.begin());

    ends_per_value = per_row(end, random).rows_per_value;
    p.B = B, p.T = T, p.W = W;
    p.start = start.data();
    if (with & kRemove) p.remove = remove.data();
    p.fill_token_id = 1000, p.pad_token_id = 2000;
    write_to(expected, with, sound_end, sound_insert);
    dlm::cpu::generic::splice(p, 0, B);
    write_to(got, with, end, insert);
  }

  void write_to(Canvas& canvas, unsigned with, const Array<int32_t>& ends,
                const Array<int32_t>& inserts) {
    p.tokens = canvas.tokens.data(), p.source = canvas.source.data(), p.info = canvas.info.data();
    if (with & kState) p.state = canvas.state.data();
    if (with & kRecords) p.commit_step = canvas.commit_step.data();
    if (with & kRecords) p.commit_confidence = canvas.commit_confidence.data();
    if (with & kLength) p.length = canvas.length.data();
    if (with & kEnd) p.end = {ends.data(), ends_per_value};
    if (with & kInsert) p.insert = inserts.data();
  }

  std::string wrong() const {  // empty: all is right
    std::string text;
    auto compare = [&](const char* name, const auto& a, const auto& b, int64_t columns) {
      for (size_t i = 0; i < a.size() && text.empty(); ++i) {
        if (a[i] == b[i]) continue;
        char line[200];
        snprintf(line, sizeof line, "%s[%d, %d] is %g, expected %g (B %d, T %d, W %d)", name,
                 int(int64_t(i) / columns), int(int64_t(i) % columns), double(a[i]), double(b[i]),
                 int(p.B), int(p.T), int(p.W));
        text = line;
      }
    };
    compare("tokens", got.tokens, expected.tokens, p.T);
    compare("state", got.state, expected.state, p.T);
    compare("commit_step", got.commit_step, expected.commit_step, p.T);
    compare("commit_confidence", got.commit_confidence, expected.commit_confidence, p.T);
    if (p.length && !clamps()) compare("length", got.length, expected.length, 1);
    compare("source", got.source, expected.source, p.T);
    compare("info", got.info, expected.info, dlm::kSpliceColumns);
    return text;
  }
  // A length out of range stays as it is where nothing happens in the row.
  bool clamps() const { return !std::equal(end.data(), end.data() + end.size(), sound_end.data()); }
};

}  // namespace check
