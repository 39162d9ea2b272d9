// SPDX-License-Identifier: Apache-2.0
// For the tests' own definitions of results: reproducible inputs and float64 arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/params.h"

namespace check {

// SplitMix64: the same numbers on every machine, so that golden outputs fit their inputs.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
  uint32_t word() { return uint32_t(bits() >> 32); }
  uint32_t below(uint32_t n) { return uint32_t(uint64_t(word()) * n >> 32); }
  double uniform(double low, double high) {
    return low + (high - low) * (double(bits() >> 11) * 0x1p-53);
  }
  // Sum of 12 uniforms: near enough to a normal variate, and exact in every libm.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform(0, 1);
    return sum;
  }

 private:
  uint64_t state_;
};

template <class T>
void fill_normal(T& array, Random& random, double scale = 1) {
  using Element = std::decay_t<decltype(array[0])>;
  for (auto& x : array) x = dlm::from_float<Element>(float(scale * random.normal()));
}

// A value for every row, for pairs of rows, or for all; `values` has as many as there are rows.
template <class T>
auto per_row(const T& values, Random& random) {
  using Element = std::decay_t<decltype(values[0])>;
  const int64_t groups[] = {1, 2, int64_t(values.size())};
  return dlm::PerRow<Element>{values.data(), groups[random.below(3)]};
}
// The same from some row on, for a call of that row alone.
template <class T>
dlm::PerRow<T> from_row(dlm::PerRow<T> values, int64_t row) {
  if (values.data) values.data += row / values.rows_per_value;
  return values;
}

// |got - want| <= tolerance * max(1, |want|); false for NaN, unless both are; equal infinities
// agree.
inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance * std::fmax(1.0, std::fabs(want));
}

}  // namespace check
