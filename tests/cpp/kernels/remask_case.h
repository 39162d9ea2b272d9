// SPDX-License-Identifier: Apache-2.0
// Random canvases for remask_; what the CPU kernel makes of them is what the CUDA kernel must make,
// bit for bit.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/remask.h"
#include "cuda/remask.h"
#include "reference.h"

namespace check {

// All that a step writes.
struct Canvas {
  Array<int64_t> tokens;
  Array<uint8_t> state;
  Array<int32_t> commit_step, step, info;
  Array<float> commit_confidence;

  Canvas(int64_t B, int64_t T)
      : tokens(size_t(B * T)),
        state(size_t(B * T)),
        commit_step(size_t(B * T)),
        step(size_t(B)),
        info(size_t(B * dlm::kInfoColumns), -77),
        commit_confidence(size_t(B * T)) {}
  void copy(Canvas& from) {
    std::copy(from.tokens.begin(), from.tokens.end(), tokens.begin());
    std::copy(from.state.begin(), from.state.end(), state.begin());
    std::copy(from.commit_step.begin(), from.commit_step.end(), commit_step.begin());
    std::copy(from.step.begin(), from.step.end(), step.begin());
    std::copy(from.commit_confidence.begin(), from.commit_confidence.end(),
              commit_confidence.begin());
  }
};

struct RemaskCase {
  enum With : unsigned {
    kCommit = 1,
    kEdit = 2,
    kRemask = 4,
    kRenoise = 8,
    kRecords = 16,
    kStep = 32,
    kFill = 64,
    kEos = 128,
    kUnordered = 256,
    kOdd = 512,
    kTwice = 1024,
    kEnd = 2048
  };

  dlm::RemaskParams p{};
  Canvas got, expected;
  Array<int32_t> position, distinct, origin, end;
  Array<int64_t> proposal, seed, eos;
  Array<uint8_t> mask;  // commit, edit, remask, renoise
  Array<float> confidence;

  RemaskCase(int64_t B, int64_t T, int64_t W, unsigned with, uint64_t random_seed)
      : got(B, T),
        expected(B, T),
        position(size_t(B * W), -1),
        distinct(size_t(B * W), -1),
        origin(size_t(B)),
        end(size_t(B)),
        proposal(size_t(B * W)),
        seed(size_t(B)),
        eos(3),
        mask(size_t(4 * B * W)),
        confidence(size_t(B * W)) {
    Random random(random_seed);
    auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    for (size_t k = 0; k < eos.size(); ++k) eos[k] = 2 + int64_t(k);
    for (int64_t b = 0; b < B; ++b) {
      // Rows that are wide open, nearly done, done; eos rare or frequent; given positions on the
      // left alone, among the others, or nowhere.
      const int64_t openness = below(3), tokens = below(2) ? 8 : 400, given = below(3);
      const int64_t prompt = below(T + 1);
      const auto is_given = [&](int64_t t) {
        return given == 0 ? t < prompt && below(2) : given == 1 && below(9) == 0;
      };
      for (int64_t t = 0; t < T; ++t) {
        const size_t i = size_t(b * T + t);
        got.tokens[i] = below(tokens);
        const bool open = openness == 0 ? below(2) : openness == 1 ? below(T) < 2 : false;
        got.state[i] =
            uint8_t(open | is_given(t) << 1 | below(2) << 2 | (below(4) == 0) << 3 | below(2) << 6);
        got.commit_step[i] = int32_t(below(9)) - 1;
        got.commit_confidence[i] = float(below(9));
      }
      got.step[size_t(b)] = int32_t(below(100));
      origin[size_t(b)] = int32_t(below(5));
      end[size_t(b)] = int32_t(below(3) ? below(T + 1) : T);
      seed[size_t(b)] = below(1ll << 50) - (1ll << 49);

      // Every T / W-th position from somewhere on, and unused slots at both ends; else in any
      // order, with gaps.
      std::vector<int32_t> all;
      for (int64_t t = 0; t < T; ++t) all.push_back(int32_t(t));
      if (with & kUnordered) {
        for (size_t i = all.size(); i > 1; --i)
          std::swap(all[i - 1], all[size_t(below(int64_t(i)))]);
      }
      const int64_t used = std::min(T, below(5) ? W : below(W + 1)),
                    first = W > used ? below(W - used + 1) : 0;
      const int64_t start = T > used ? below(T - used + 1) : 0;
      for (int64_t i = 0; i < used; ++i) {
        const size_t w = size_t(b * W + first + i);
        position[w] = distinct[w] = all[size_t(start + i)];
        if (!(with & kUnordered)) continue;
        if (below(8) == 0) position[w] = distinct[w] = -1;
        if (!(with & kTwice)) continue;
        // What a tensor may hold against the rules: a position off the canvas, or given before in
        // the row.
        if (below(8) == 0)
          position[w] = int32_t(below(2)   ? T + below(3)
                                : below(2) ? -5
                                           : INT32_MAX),
          distinct[w] = -1;
        if (i > 0 && below(4) == 0)
          position[w] = position[size_t(b * W + first + below(i))], distinct[w] = -1;
      }
      for (int64_t w = 0; w < W; ++w) {
        const size_t i = size_t(b * W + w);
        proposal[i] = below(10) ? below(tokens) : -1;
        confidence[i] = float(random.uniform(0, 1));
        for (int64_t k = 0; k < 4; ++k) mask[size_t(k * B * W) + i] = below(k < 2 ? 2 : 5) == 0;
      }
    }
    expected.copy(got);

    auto asked = [&](int k) { return with >> k & 1 ? mask.data() + k * B * W : nullptr; };
    p.B = B, p.T = T, p.W = W;
    p.position = distinct.data(), p.proposal = proposal.data(), p.confidence = confidence.data();
    p.commit = asked(0), p.edit = asked(1), p.remask = asked(2), p.renoise = asked(3);
    p.seed = per_row(seed, random), p.origin = per_row(origin, random);
    if (with & kEnd) p.end = per_row(end, random);
    p.mask_token_id = 1, p.vocab_size = 1000, p.fill_token_id = below(2) ? 6 : eos[0];
    p.eos_token_ids = eos.data(), p.eos_count = with & kEos ? int64_t(eos.size()) : 0;
    p.eos_policy = with & kFill ? dlm::EosPolicy::kFill : dlm::EosPolicy::kNone;
    write_to(expected, with);
    dlm::cpu::generic::remask(p, 0, B);
    p.position = position.data();
    write_to(got, with);
  }

  void write_to(Canvas& canvas, unsigned with) {
    p.tokens = canvas.tokens.data(), p.state = canvas.state.data(), p.info = canvas.info.data();
    if (with & kRecords) p.commit_step = canvas.commit_step.data();
    if (with & kRecords) p.commit_confidence = canvas.commit_confidence.data();
    if (with & kStep) p.step = canvas.step.data();
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
    compare("step", got.step, expected.step, 1);
    compare("info", got.info, expected.info, dlm::kInfoColumns);
    return text;
  }
};

}  // namespace check
