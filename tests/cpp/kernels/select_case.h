// SPDX-License-Identifier: Apache-2.0
// Random windows for select_tokens, full of ties and of values that are no numbers; what the CPU
// kernel says of them is what the CUDA kernel must say, bit for bit.
#pragma once
#include <string>

#include "check.h"
#include "cpu/select_tokens.h"
#include "cuda/select_tokens.h"
#include "reference.h"

namespace check {

struct SelectCase {
  // What of the optional arguments there is.
  enum With : unsigned {
    kGate = 1,
    kNeed = 2,
    kFill = 4,
    kCap = 8,
    kOrder = 16,
    kStrict = 32,
    kWide = 64
  };

  dlm::SelectTokensParams p{};
  Array<float> score, cost, parameter, temperature;
  Array<uint8_t> eligible, gate, selected, expected;  // bool, as in a tensor
  Array<int32_t> need, fill, cap, step, position, count, expected_count;
  Array<int64_t> seed;

  SelectCase(int64_t B, int64_t W, dlm::Rule rule, unsigned with, uint64_t random_seed)
      : score(size_t(B * W)),
        cost(size_t(B * W)),
        parameter(size_t(B)),
        temperature(size_t(B)),
        eligible(size_t(B * W)),
        gate(size_t(B * W)),
        selected(size_t(B * W), 0xaa),
        expected(size_t(B * W), 0xbb),
        need(size_t(B)),
        fill(size_t(B)),
        cap(size_t(B)),
        step(size_t(B)),
        position(size_t(B * W)),
        count(size_t(B), -7),
        expected_count(size_t(B), -9),
        seed(size_t(B)) {
    Random random(random_seed);
    auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    const float odd[] = {NAN, -INFINITY, INFINITY, 0.0f, -0.0f, 1.0f};
    for (int64_t b = 0; b < B; ++b) {
      const bool distinct = with & kWide, sparse = below(4) == 0;
      for (int64_t w = 0; w < W; ++w) {
        const size_t i = size_t(b * W + w);
        score[i] = distinct ? float(random.uniform(0, 1)) : float(below(9)) / 8;
        cost[i] =
            rule == dlm::Rule::kBernoulli ? float(random.uniform(0, 1)) : float(below(64)) / 256;
        if (below(distinct ? 200 : 12) == 0) score[i] = odd[below(6)];
        if (below(400) == 0) cost[i] = odd[below(3)];
        eligible[i] = below(10) > 0 && !(sparse && below(4));
        gate[i] = below(3) > 0;
        position[i] = int32_t(below(100000)) - 10;
      }
      // Budgets that end within the window, wherever its end is.
      const bool threshold = rule == dlm::Rule::kThreshold;
      parameter[size_t(b)] =
          threshold ? float(below(9)) / 8 : float(random.uniform(0, double(W))) / 8;
      // Scores that cross the levels of "factor" at a middling rank.
      for (int64_t w = 0; w < W && rule == dlm::Rule::kFactor; ++w) {
        const double x = random.uniform(0, 1);
        if (score[size_t(b * W + w)] > 0)
          score[size_t(b * W + w)] = float(1 - parameter[size_t(b)] * x * x * x);
      }
      if (below(30) == 0) parameter[size_t(b)] = odd[below(3)];
      temperature[size_t(b)] = below(3) ? 0.1f + float(random.uniform(0, 1)) : 0.0f;
      const int64_t some = below(2) ? W : 4;
      need[size_t(b)] = int32_t(below(some + 3)) - 1;
      fill[size_t(b)] = int32_t(below(some + 3)) - 1;
      cap[size_t(b)] = int32_t(below(some + 3)) - 1;
      seed[size_t(b)] = below(1ll << 50) * (below(2) ? 1 : -1);
      step[size_t(b)] = int32_t(3 + 5 * b + below(5));
    }

    p.B = B, p.W = W, p.rule = rule, p.strict = with & kStrict;
    p.score = score.data(), p.cost = cost.data();
    p.eligible = eligible.data();
    if (with & kGate) p.gate = gate.data();
    p.parameter = per_row(parameter, random);
    if (with & kNeed) p.need = per_row(need, random);
    if (with & kFill) p.fill = per_row(fill, random);
    if (with & kCap) p.cap = per_row(cap, random);
    if (with & kOrder) p.order_temperature = per_row(temperature, random);
    p.random = {per_row(seed, random), per_row(step, random), position.data()};
    p.selected = reinterpret_cast<bool*>(expected.data()), p.count = expected_count.data();
    dlm::cpu::generic::select_tokens(p, 0, B);
    p.selected = reinterpret_cast<bool*>(selected.data()), p.count = count.data();
  }

  std::string wrong() const {  // empty: all is right
    char text[200];
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t w = 0; w < p.W; ++w) {
        const size_t i = size_t(b * p.W + w);
        if (selected[i] == expected[i]) continue;
        snprintf(text, sizeof text, "selected[%d, %d] is %d, expected %d (B %d, W %d, rule %d)",
                 int(b), int(w), selected[i], expected[i], int(p.B), int(p.W), int(p.rule));
        return text;
      }
      if (count[size_t(b)] == expected_count[size_t(b)]) continue;
      snprintf(text, sizeof text, "count[%d] is %d, expected %d (B %d, W %d, rule %d)", int(b),
               count[size_t(b)], expected_count[size_t(b)], int(p.B), int(p.W), int(p.rule));
      return text;
    }
    return "";
  }
};

}  // namespace check
