// SPDX-License-Identifier: Apache-2.0
// Random drafts for verify_drafts; what the CPU kernel makes of them is what the CUDA kernel must
// make, bit for bit.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/verify_drafts.h"
#include "cuda/verify_drafts.cuh"
#include "reference.h"

namespace check {

struct VerifyCase {
  enum With : unsigned {
    kRatio = 1,
    kMaps = 2,
    kBanned = 4,
    kSpecial = 8,
    kCold = 16,     // some rows at temperature 0
    kHostile = 32,  // rows out of range, drafts beyond the vocabulary; implies kRatio and kBanned
    kShifted = 64,  // rows of logits start anywhere
    kFlat = 128,    // much alike, and equal in value
    kLenient = 256,
    kAgree = 512,  // hardly a draft fails
  };

  dlm::VerifyDraftsParams p{};
  Array<int64_t> drafts, sound_drafts, token, banned, seed, tokens, expected_tokens;
  Array<int32_t> row_map, draft_row_map, sound_map, sound_draft_map, step, position, accepted,
      expected_accepted;
  Array<float> logsumexp, draft_logsumexp, temperature;
  Array<uint8_t> logits, draft_logits, workspace;

  VerifyCase(dlm::DType dtype, int64_t B, int64_t W, int64_t V, unsigned with, uint64_t random_seed)
      : drafts(size_t(B * W)),
        sound_drafts(size_t(B * W)),
        token(size_t(B * (W + 1))),
        banned(3),
        seed(size_t(B)),
        tokens(size_t(B * (W + 1)), -7),
        expected_tokens(size_t(B * (W + 1)), -8),
        row_map(size_t(B * (W + 1))),
        draft_row_map(size_t(B * W)),
        sound_map(size_t(B * (W + 1))),
        sound_draft_map(size_t(B * W)),
        step(size_t(B)),
        position(size_t(B)),
        accepted(size_t(B), -7),
        expected_accepted(size_t(B), -8),
        logsumexp(size_t(B * (W + 1))),
        draft_logsumexp(size_t(B * W)),
        temperature(size_t(B)) {
    Random random(random_seed);
    const auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    const bool hostile = with & kHostile;
    const int64_t size = dtype == dlm::DType::kFloat32 ? 4 : 2, shift = with & kShifted ? 3 : 0;
    const int64_t R = B * (W + 1), Q = B * W;
    const int64_t stride = V + shift, draft_stride = V + (shift ? 5 : 16), draft_shift = shift != 0;
    logits = Array<uint8_t>(size_t((R * stride + shift) * size));
    draft_logits = Array<uint8_t>(size_t((Q * draft_stride + draft_shift) * size));
    // What must not be read is larger than anything else.
    for (int64_t i = 0; i < R * stride + shift; ++i) write(logits, dtype, i, 60000);
    for (int64_t i = 0; i < Q * draft_stride + draft_shift; ++i)
      write(draft_logits, dtype, i, 60000);
    const double spread = with & kFlat ? 0.0 : 3.0, unlike = with & kAgree ? 0.01 : 1.5;
    for (int64_t b = 0; b < B; ++b) {
      temperature[size_t(b)] = with & kCold && below(3) == 0 ? 0 : float(random.uniform(0.4, 2));
      seed[size_t(b)] = below(1ll << 50) - (1ll << 49);
      step[size_t(b)] = int32_t(below(100));
      position[size_t(b)] = int32_t(below(10000)) - 10;
      const int64_t ends = below(3) ? W : below(W + 1);
      for (int64_t w = 0; w <= W; ++w) {
        const int64_t row = b * (W + 1) + w, draft_row = b * W + w;
        double total = 0, draft_total = 0;
        for (int64_t v = 0; v < V; ++v) {
          double z = spread * random.normal(), y = z + unlike * random.normal();
          if (with & kFlat) z = double(below(2)), y = double(below(2));
          if (with & kSpecial && below(20) == 0) (below(2) ? z : y) = below(2) ? -INFINITY : NAN;
          total += z == z ? std::exp(z / 1.1) : 0;
          draft_total += y == y ? std::exp(y / 1.1) : 0;
          write(logits, dtype, shift + row * stride + v, float(z));
          if (w == W) continue;
          write(draft_logits, dtype, draft_shift + draft_row * draft_stride + v, float(y));
        }
        // Near the true ones: the op does as it is told.
        logsumexp[size_t(row)] = float(std::log(total) + random.uniform(-0.1, 0.1));
        token[size_t(row)] = V > 1 ? 1 + below(V - 1) : 0;
        row_map[size_t(row)] = sound_map[size_t(row)] = int32_t(below(8) ? below(R) : -1);
        if (hostile && below(4) == 0)
          row_map[size_t(row)] = int32_t(R + below(9)), sound_map[size_t(row)] = -1;
        if (w == W) continue;
        const size_t i = size_t(draft_row);
        draft_logsumexp[i] = float(std::log(draft_total) + random.uniform(-0.1, 0.1));
        drafts[i] = sound_drafts[i] = w < ends ? (below(3) ? token[size_t(row)] : below(V)) : -1;
        // An id that is banned and never the target's fails in the same way.
        if (hostile && w < ends && below(4) == 0)
          drafts[i] = V + below(1ll << 40), sound_drafts[i] = 0;
        draft_row_map[i] = sound_draft_map[i] = int32_t(below(8) ? below(Q) : -1);
        if (hostile && below(4) == 0) {
          draft_row_map[i] = int32_t(below(2) ? Q + below(B) : INT32_MAX), sound_draft_map[i] = -1;
        }
      }
    }
    banned[0] = 0, banned[1] = -1, banned[2] = V / 2;

    p.dtype = dtype, p.B = B, p.W = W, p.leniency = with & kLenient ? 0.6f : 1.0f;
    p.drafts = sound_drafts.data(), p.token = token.data();
    if (with & kRatio) {
      p.V = V, p.R = R, p.Q = Q;
      p.logits = logits.data() + shift * size, p.logits_stride = stride;
      p.draft_logits = draft_logits.data() + draft_shift * size, p.draft_stride = draft_stride;
      p.logsumexp = logsumexp.data(), p.draft_logsumexp = draft_logsumexp.data();
      p.temperature = per_row(temperature, random);
      p.random = {per_row(seed, random), per_row(step, random), position.data(), {}};
    }
    if (with & kBanned) p.banned = banned.data(), p.banned_count = int64_t(banned.size());
    if (with & kMaps) p.row_map = sound_map.data(), p.draft_row_map = sound_draft_map.data();
    expect();
    p.drafts = drafts.data();
    workspace = Array<uint8_t>(size_t(dlm::cuda::verify_workspace(p)), 0x7f);
    if (with & kMaps) p.row_map = row_map.data(), p.draft_row_map = draft_row_map.data();
  }

  static void write(Array<uint8_t>& to, dlm::DType dtype, int64_t at, float value) {
    const uint16_t bits = dtype == dlm::DType::kBFloat16
                              ? dlm::from_float<dlm::BFloat16>(value).bits
                              : dlm::from_float<dlm::Float16>(value).bits;
    if (dtype == dlm::DType::kFloat32) {
      memcpy(to.data() + at * 4, &value, 4);
    } else {
      memcpy(to.data() + at * 2, &bits, 2);
    }
  }
  // What the CPU kernel makes of the arguments.
  void expect() {
    p.accepted = expected_accepted.data(), p.tokens = expected_tokens.data();
    dlm::cpu::generic::verify_drafts(p, 0, p.B);
    p.accepted = accepted.data(), p.tokens = tokens.data();
  }

  std::string wrong() const {  // empty: all is right
    char text[200];
    for (int64_t b = 0; b < p.B; ++b) {
      const size_t i = size_t(b);
      if (accepted[i] != expected_accepted[i]) {
        snprintf(text, sizeof text, "accepted[%d] is %d, expected %d (B %d, W %d, V %d)", int(b),
                 accepted[i], expected_accepted[i], int(p.B), int(p.W), int(p.V));
        return text;
      }
      for (int64_t w = 0; w <= p.W; ++w) {
        const size_t at = size_t(b * (p.W + 1) + w);
        if (tokens[at] == expected_tokens[at]) continue;
        snprintf(text, sizeof text, "tokens[%d, %d] is %lld, expected %lld (B %d, W %d, V %d)",
                 int(b), int(w), (long long)tokens[at], (long long)expected_tokens[at], int(p.B),
                 int(p.W), int(p.V));
        return text;
      }
    }
    return "";
  }
};

}  // namespace check
