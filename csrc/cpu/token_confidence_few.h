// SPDX-License-Identifier: Apache-2.0
// Statistics of rows of few logits (see token_confidence.cpp) in vectors: each file for one
// instruction set includes this after its simd_*.h. Sixteen rows are transposed, so that each has
// its own lane and no step is done for a single row. Takes about 40 operations per logit of 16
// rows, of which 8 are for the transposition.
#pragma once
#include <algorithm>

#include "common/philox.h"
#include "cpu/token_confidence_vectors.h"

namespace dlm::cpu::DLM_NAMESPACE {
namespace {

static_assert(kRowsTogether == kWidth);

// The final steps of a row are in double, for all rows together: loops over lanes, for a
// vectorizer.

// log(1 + x) for 0 <= x < 2^20, with a relative error below 1e-11: the error of 1 + x cancels
// (Kahan).
inline double log_of_one_and(double x) {
  const double u = 1.0 + x, more = u - 1.0;
  const int32_t e = int32_t(float_to_bits(float(u)) - 0x3f3504f3u) >> 23;
  const double m = u * double(bits_to_float(uint32_t(127 - e) << 23));  // close to 1
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 13;
  for (const double n : {11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) p = p * z + 1.0 / n;
  const double log = double(e) * 0.6931471805599453 + 2.0 * s * p;
  const double exact = log * (x / (more > 0.0 ? more : 1.0));
  return more > 0.0 ? exact : x;
}
// e^x - 1 for x <= 0, with a relative error below 1e-9; -1 below -87.
inline double exponential_less_one(double x) {
  const double clamped = x > -87.0 ? x : -87.0;
  const double shifted = clamped * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const double n = shifted - 6755399441055744.0;
  const double r = clamped - n * 0.6931471805599453;
  double p = 1.0;
  for (const double k : {10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0})
    p = p * (r * (1.0 / k)) + 1.0;
  const double power = double(bits_to_float(uint32_t(int32_t(n) + 127) << 23));
  const double result = power * (r * p) + (power - 1.0);
  return x > -87.0 ? result : -1.0;
}

// e^x for x <= 0 (and -inf, NaN) within one unit in the last place: Cephes' expf polynomial
// (Moshier).
DLM_SIMD Floats exponential(Floats x) {
  const Floats least = splat(kExpUnderflow), clamped = max(least, x);  // NaN stays NaN
  const Floats shifted = fma(clamped, splat(1.44269504f), splat(12582912.0f));
  const Floats n = shifted - splat(12582912.0f);
  const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  Floats p = splat(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, r, splat(c));
  }
  p = fma(p, r * r, r) + splat(1.0f);
  return select(less(x, least), splat(0.0f), from_bits(bits(p) + (bits(shifted) << 23)));
}

// Sets z[v] to logit v of every row.
template <class T>
void load_rows(FewRows& rows, int V, Floats* z) {
  for (int first = 0; first < V; first += kWidth) {
    // The last tile overlaps the previous one, so that it is complete.
    const int at = std::max(std::min(first, V - kWidth), 0), n = std::min(V, kWidth);
    Words tile[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      tile[r] = r < rows.count ? bits(effective<T>(*rows.row[r], at, n, rows.flags[r])) : splat(0u);
    }
    transpose(tile);
    for (int v = first; v < at + n; ++v) z[v] = from_bits(tile[v - at]);
  }
}

template <class T>
void measure_rows_as(FewRows& rows) {
  const int V = int(rows.row[0]->V);
  alignas(64) Floats z[kFewLogits];
  const auto logit = [&](int64_t v, int r) -> float& {
    return reinterpret_cast<float*>(z)[v * kWidth + r];
  };
  for (int r = 0; r < kWidth; ++r) {
    rows.flags[r] = 0;
    if (r >= rows.count) rows.scale[r] = 1.0f, rows.given[r] = -1;
  }
  load_rows<T>(rows, V, z);
  for (int r = 0; r < rows.count; ++r) {
    const LogitsRow& row = *rows.row[r];
    for (int64_t i = 0; row.banned && i < row.banned_count; ++i) {
      if (uint64_t(row.banned[i]) < uint64_t(V)) logit(row.banned[i], r) = -kInfinity;
    }
  }

  Floats top = splat(-kInfinity), next = top;
  Words where = splat(0xffffffffu);
  for (int v = 0; v < V; ++v) {
    next = max(min(top, z[v]), next);
    where = select(less(top, z[v]), splat(uint32_t(v)), where);
    top = max(z[v], top);
  }
  alignas(64) float second[kWidth], base[kWidth], of_given[kWidth], exponent[kWidth];
  alignas(64) uint32_t at[kWidth];
  store(rows.max, top);
  store(second, next);
  store(at, where);
  for (int r = 0; r < kWidth; ++r) {
    const bool any = at[r] != 0xffffffffu;
    rows.argmax[r] = any ? int64_t(at[r]) : -1;
    base[r] = any ? rows.max[r] : 0.0f;
    of_given[r] = rows.given[r] >= 0 ? logit(rows.given[r], r) : -kInfinity;
    if (any) logit(at[r], r) = -kInfinity;
  }

  const Floats of_base = load(base), scale = load(rows.scale);
  Floats sum[2] = {splat(0.0f), splat(0.0f)}, weighted[2] = {sum[0], sum[0]};
  const auto add = [&](int v) {
    const Floats x = (z[v] - of_base) * scale, w = exponential(x);
    sum[v % 2] = sum[v % 2] + w;
    // -inf must not be multiplied by its weight, 0.
    if (rows.entropy) weighted[v % 2] = fma(max(x, splat(-1000.0f)), w, weighted[v % 2]);
  };
  for (int v = 0; v + 1 < V; v += 2) add(v), add(v + 1);
  if (V % 2) add(V - 1);
  store(rows.weight, sum[0] + sum[1]);
  store(exponent, weighted[0] + weighted[1]);

  for (int r = 0; r < kWidth; ++r) {
    const double steps = rows.scale[r], weight = rows.weight[r], total = 1.0 + weight;
    const double log_total = log_of_one_and(weight), maximum = rows.max[r];
    const double of_second = (double(second[r]) - double(base[r])) * steps;
    const double given = (double(of_given[r]) - double(base[r])) * steps;
    rows.confidence[r] = float(1.0 / total);
    rows.margin[r] = float(-exponential_less_one(of_second) / total);
    rows.of_entropy[r] = float(log_total - double(exponent[r]) / total);
    rows.logsumexp[r] = float(maximum * steps + log_total);
    rows.p_given[r] = float((exponential_less_one(given) + 1.0) / total);
  }
}

void measure_rows(FewRows& rows) {
  switch (rows.row[0]->dtype) {
    case DType::kFloat32:
      return measure_rows_as<float>(rows);
    case DType::kBFloat16:
      return measure_rows_as<BFloat16>(rows);
    default:
      return measure_rows_as<Float16>(rows);
  }
}

}  // namespace
}  // namespace dlm::cpu::DLM_NAMESPACE
