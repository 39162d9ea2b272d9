// SPDX-License-Identifier: Apache-2.0
// Random logits and arguments for token_confidence. Ids and flags must be those of the CPU kernel;
// probabilities are compared with float64, of logits that are guided, biased and banned here.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/token_confidence.h"
#include "cuda/token_confidence.cuh"
#include "reference.h"

namespace check {

struct ConfidenceCase {
  enum With : unsigned {
    kSample = 1,
    kTopK = 2,
    kTopP = 4,
    kTopPFirst = 8,
    kDropCrossing = 16,
    kBias = 32,
    kGuidance = 64,
    kBanned = 128,
    kBitmask = 256,
    kRowMap = 512,
    kTies = 1024,     // few distinct logits
    kSpecial = 2048,  // NaN and infinities
    kPeaked = 4096,   // one logit far above the others
    kShifted = 8192,  // rows start anywhere
    kWild = 16384,    // rows and ids out of range
    kBrief = 32768,   // neither margin nor entropy
    kTwoValues = 65536  // one logit at 0, masses of all others just below 2^32 units; top-p 0.5
  };

  static constexpr int64_t kBans = 3;

  dlm::TokenConfidenceParams p{};
  unsigned with;
  Array<uint8_t> logits, uncond, workspace;
  Array<int32_t> row_map, sound_map, bitmask, top_k, step, redraw, position, flags, expected_flags;
  Array<int64_t> given, sound_given, banned, sound_banned, seed, token, argmax, expected_token,
      expected_argmax;
  Array<float> cfg_scale, bias, temperature, top_p, statistics, expected_statistics;

  ConfidenceCase(dlm::DType dtype, int64_t N, int64_t V, unsigned with_,
                 dlm::Distribution distribution, uint64_t random_seed)
      : with(with_),
        row_map(size_t(N)),
        sound_map(size_t(N)),
        bitmask(size_t(N * ((V + 31) / 32))),
        top_k(size_t(N)),
        step(size_t(N)),
        redraw(size_t(N)),
        position(size_t(N)),
        flags(size_t(N), -7),
        expected_flags(size_t(N)),
        given(size_t(N)),
        sound_given(size_t(N)),
        banned(size_t(N * kBans)),
        sound_banned(size_t(N * kBans)),
        seed(size_t(N)),
        token(size_t(N), -7),
        argmax(size_t(N), -7),
        expected_token(size_t(N)),
        expected_argmax(size_t(N)),
        cfg_scale(size_t(N)),
        bias(size_t(N * V)),
        temperature(size_t(N)),
        top_p(size_t(N)),
        statistics(size_t(6 * N), NAN),
        expected_statistics(size_t(6 * N)) {
    Random random(random_seed);
    const auto below = [&](int64_t n) { return int64_t(random.uniform(0, double(n))); };
    const int64_t R = with & kRowMap ? 3 : N;

    p.dtype = dtype, p.N = N, p.R = R, p.V = V;
    const int64_t size = dtype == dlm::DType::kFloat32 ? 4 : 2;
    const int64_t offset = with & kShifted ? 1 + below(7) : 0;
    const int64_t stride = with & kShifted ? V + below(9) : (V + 15) / 16 * 16;
    p.logits_stride = stride, p.uncond_stride = stride + (with & kShifted ? 1 + below(5) : 16);
    logits = Array<uint8_t>(size_t(size * (offset + stride * (R - 1) + V)));
    uncond = Array<uint8_t>(size_t(size * (p.uncond_stride * (R - 1) + V)));
    const double scale = with & kPeaked ? 1.5 : random.uniform(0.5, 4);
    const auto write = [&](Array<uint8_t>& to, int64_t i, float x) {
      if (dtype == dlm::DType::kFloat32) memcpy(&to[size_t(4 * i)], &x, 4);
      const auto b = dlm::from_float<dlm::BFloat16>(x);
      const auto h = dlm::from_float<dlm::Float16>(x);
      if (dtype == dlm::DType::kBFloat16) memcpy(&to[size_t(2 * i)], &b, 2);
      if (dtype == dlm::DType::kFloat16) memcpy(&to[size_t(2 * i)], &h, 2);
    };
    // What must not be read is larger than anything else.
    for (int64_t i = 0; i < int64_t(logits.size()) / size; ++i) write(logits, i, 60000);
    for (int64_t i = 0; i < int64_t(uncond.size()) / size; ++i) write(uncond, i, -60000);
    const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 0.0f};
    for (int64_t r = 0; r < R; ++r) {
      const bool special = with & kSpecial && below(3) > 0;
      for (int64_t v = 0; v < V; ++v) {
        float x = with & kTies ? float(below(5)) : float(scale * random.normal());
        if (special && below(std::max<int64_t>(V / 4, 2)) == 0) x = odd[below(5)];
        if (with & kSpecial && r == 1) x = -INFINITY;
        if (with & kTwoValues) x = v == V / 2 ? 0.0f : -6.9375f;
        write(logits, offset + r * stride + v, x);
        write(uncond, r * p.uncond_stride + v, float(random.normal()));
      }
      if (with & kPeaked) write(logits, offset + r * stride + below(V), 9 + 3 * float(r));
    }
    for (auto& x : bias) x = float(random.normal());
    for (auto& x : bitmask) x = int32_t(random.word() | random.word() | 0x10001);
    for (size_t i = 0; i < banned.size(); ++i) {
      banned[i] = sound_banned[i] = i % 3 ? below(V) : -1;
      if (with & kWild && i % 3 == 0) banned[i] = below(2) ? V : -5;
    }
    for (int64_t n = 0; n < N; ++n) {
      const size_t i = size_t(n);
      row_map[i] = sound_map[i] = int32_t(below(R + 1)) - 1;
      given[i] = sound_given[i] = below(V + 1) - 1;
      if (with & kWild && below(3) == 0) {
        row_map[i] = below(2) ? int32_t(R) : INT32_MIN, sound_map[i] = -1;
        given[i] = below(2) ? V : INT64_MIN, sound_given[i] = -1;
      }
      const int64_t few = std::min<int64_t>(V, 40);
      top_k[i] = int32_t(below(4) ? 1 + below(below(2) ? few : V + 2) : 0);
      const float shares[] = {0.0f, 1.0f, 0.99999994f, float(random.uniform(0, 1)), 0.9f};
      top_p[i] = with & kTwoValues ? 0.5f : shares[below(5)];
      temperature[i] = below(5) ? float(random.uniform(0.3, 2)) : 0.0f;
      cfg_scale[i] = float(random.uniform(-1, 2));
      seed[i] = int64_t(random.bits());
      position[i] = int32_t(random.word());
      step[i] = int32_t(3 + 5 * n + below(5));
      redraw[i] = int32_t(below(3));
    }

    p.logits = logits.data() + offset * size;
    if (with & kRowMap) p.row_map = sound_map.data();
    p.given = sound_given.data();
    if (with & kGuidance) p.uncond_logits = uncond.data(), p.cfg_scale = per_row(cfg_scale, random);
    if (with & kBias) p.bias = bias.data();
    if (with & kBanned) p.banned = sound_banned.data(), p.banned_count = kBans;
    if (with & kBitmask) p.bitmask = bitmask.data();
    p.bitmask_words = (V + 31) / 32;
    // Shared by all rows, by two, by none: each by another number of them.
    const int64_t shared[] = {1, 2, N}, turn = below(3);
    p.bias_rows_per_value = shared[turn];
    p.banned_rows_per_value = shared[(turn + 1) % 3];
    p.bitmask_rows_per_value = shared[(turn + 2) % 3];
    if (with & kSample) p.temperature = per_row(temperature, random);
    if (with & kTopK) p.top_k = per_row(top_k, random);
    if (with & kTopP) p.top_p = per_row(top_p, random);
    p.top_p_first = with & kTopPFirst, p.keep_crossing = !(with & kDropCrossing);
    p.distribution = distribution;
    p.random = {per_row(seed, random), per_row(step, random), position.data(),
                per_row(redraw, random)};
    expect();
    workspace = Array<uint8_t>(size_t(dlm::cuda::workspace_of(p)), 0xff);
  }

  // What the CPU makes of the logits and of sound arguments.
  void expect() {
    if (with & kRowMap) p.row_map = sound_map.data();
    p.given = sound_given.data();
    if (with & kBanned) p.banned = sound_banned.data();
    write_to(expected_token, expected_argmax, expected_statistics, expected_flags);
    run_on_cpu();
    if (with & kRowMap) p.row_map = row_map.data();
    p.given = given.data();
    if (with & kBanned) p.banned = banned.data();
    write_to(token, argmax, statistics, flags);
  }

  void run_on_cpu() {
    Array<float> sums(size_t(p.N * dlm::cpu::token_confidence_sums(p.V)));
    Array<uint64_t> scratch(size_t(dlm::cpu::token_confidence_scratch(p.V) / 8));
    dlm::cpu::token_confidence(p, sums.data(), scratch.data(), 0, p.N);
  }

  void write_to(Array<int64_t>& tokens, Array<int64_t>& argmaxes, Array<float>& floats,
                Array<int32_t>& bits) {
    float* x = floats.data();
    p.token = tokens.data(), p.argmax = argmaxes.data(), p.flags = bits.data();
    p.confidence = x, p.logsumexp = x + p.N, p.p_given = x + 2 * p.N;
    p.margin = with & kBrief ? nullptr : x + 3 * p.N;
    p.entropy = with & kBrief ? nullptr : x + 4 * p.N;
    p.floor = with & kBrief ? nullptr : x + 5 * p.N;
  }

  // Confidence, logsumexp, p_given, margin, entropy of row n, in float64.
  std::vector<double> gold(int64_t n) const {
    const int64_t source = p.row_map ? sound_map[size_t(n)] : n, V = p.V;
    std::vector<double> result = {-INFINITY, -INFINITY, 0, 0, 0};
    if (source < 0) return result;
    const auto read = [&](const void* data, int64_t i) {
      if (p.dtype == dlm::DType::kFloat32) return static_cast<const float*>(data)[i];
      const uint16_t bits = static_cast<const uint16_t*>(data)[i];
      return p.dtype == dlm::DType::kBFloat16 ? dlm::to_float(dlm::BFloat16{bits})
                                              : dlm::to_float(dlm::Float16{bits});
    };
    std::vector<double> z(static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      float x = read(p.logits, source * p.logits_stride + v);
      if (p.uncond_logits) {
        const float u = read(p.uncond_logits, source * p.uncond_stride + v);
        x = u + (p.cfg_scale.at(n, 0) + 1.0f) * (x - u);
      }
      if (p.bias) x += p.bias[n / p.bias_rows_per_value * V + v];
      if (x != x) x = -INFINITY;
      const int64_t word = n / p.bitmask_rows_per_value * p.bitmask_words + v / 32;
      if (p.bitmask && !(p.bitmask[word] >> v % 32 & 1)) x = -INFINITY;
      z[size_t(v)] = std::fmin(x, 3.402823466e+38f);
    }
    for (int64_t i = 0; p.banned && i < p.banned_count; ++i) {
      const int64_t id = sound_banned[size_t(n / p.banned_rows_per_value * p.banned_count + i)];
      if (id >= 0) z[size_t(id)] = -INFINITY;
    }
    const float asked = p.temperature.at(n, 0.0f);
    const double T = asked > 0 ? asked : 1.0;
    const bool raw = p.distribution == dlm::Distribution::kRaw;
    const auto total = [&](double divisor, double floor) {
      const double max = *std::max_element(z.begin(), z.end());
      double sum = 0;
      for (double x : z) sum += x >= floor && x > -INFINITY ? std::exp((x - max) / divisor) : 0;
      return sum;
    };
    std::vector<double> sorted = z;
    std::sort(sorted.rbegin(), sorted.rend());
    if (sorted[0] == -INFINITY) return result;
    double floor = -INFINITY;
    if (p.distribution == dlm::Distribution::kFiltered) {
      const int64_t k = p.top_k.at(n, 0);
      double kth = k > 0 && k < V ? sorted[size_t(k - 1)] : -INFINITY;
      floor = kth;
      const double q = p.top_p.at(n, 1.0f);
      if (q < 1) {
        const double limit = q * total(T, p.top_p_first ? -INFINITY : kth);
        double larger = 0, lowest = -INFINITY;
        for (size_t i = 0; i < sorted.size();) {  // a group of equal logits at a time
          size_t end = i;
          double here = 0;
          while (end < sorted.size() && sorted[end] == sorted[i])
            here += std::exp((sorted[end++] - sorted[0]) / T);
          const bool stays = p.keep_crossing ? larger <= limit : larger + here <= limit || i == 0;
          if (!stays || sorted[i] == -INFINITY) break;
          lowest = sorted[i], larger += here, i = end;
        }
        floor = std::max(floor, lowest);
      }
    }
    const double divisor = raw ? 1 : T, all = total(divisor, floor);
    const auto probability = [&](double x) {
      return x >= floor && x > -INFINITY ? std::exp((x - sorted[0]) / divisor) / all : 0.0;
    };
    const int64_t chosen = expected_token[size_t(n)], wanted = sound_given[size_t(n)];
    result[0] = probability(z[size_t(chosen)]);
    result[1] = sorted[0] / divisor + std::log(all);
    result[2] = wanted >= 0 ? probability(z[size_t(wanted)]) : 0;
    result[3] = probability(sorted[0]) - (V > 1 ? probability(sorted[1]) : 0);
    for (double x : z) {
      const double q = probability(x);
      if (q > 0) result[4] -= q * std::log(q);
    }
    return result;
  }

  cudaError_t start() { return dlm::cuda::start_token_confidence(p, workspace.data(), nullptr); }

  std::string wrong() const {  // empty: all is right
    char text[300];
    const auto place = [&](int64_t n) {
      char line[100];
      snprintf(line, sizeof line, " (row %d of %d, V %d, dtype %d, distribution %d, arguments %x)",
               int(n), int(p.N), int(p.V), int(p.dtype), int(p.distribution), with);
      return std::string(line);
    };
    const char* names[] = {"confidence", "logsumexp", "p_given", "margin", "entropy"};
    for (int64_t n = 0; n < p.N; ++n) {
      const size_t i = size_t(n);
      const auto differs = [&](const char* name, int64_t got, int64_t expected) {
        snprintf(text, sizeof text, "%s is %lld, expected %lld", name, (long long)got,
                 (long long)expected);
        return got != expected;
      };
      if (differs("argmax", argmax[i], expected_argmax[i])) return text + place(n);
      if (differs("token", token[i], expected_token[i])) return text + place(n);
      if (differs("flags", flags[i], expected_flags[i])) return text + place(n);
      // The k-th largest logit is the same on every device; top-p adds up probabilities.
      const size_t f = size_t(5 * p.N + n);
      if (p.floor && !(with & kTopP) && statistics[f] != expected_statistics[f]) {
        snprintf(text, sizeof text, "floor is %.9g, expected %.9g", statistics[f],
                 expected_statistics[f]);
        return text + place(n);
      }
      const std::vector<double> want = gold(n);
      for (int64_t k = 0; k < (with & kBrief ? 3 : 5); ++k) {
        const double got = statistics[size_t(k * p.N + n)];
        if (close(got, float(want[size_t(k)]), 2e-6)) continue;
        snprintf(text, sizeof text, "%s is %.9g, expected %.9g", names[k], got, want[size_t(k)]);
        return text + place(n);
      }
    }
    return "";
  }
};

}  // namespace check
