// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/common by C names, over arrays: tests/support/native.py builds it and tests call it
// through ctypes.
#include <algorithm>

#include "common/dtype.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/race.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT half_to_float(const dlm::Float16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::to_float(x[i]);
}
EXPORT float_to_half(const float* x, dlm::Float16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::from_float<dlm::Float16>(x[i]);
}
EXPORT bfloat16_to_float(const dlm::BFloat16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::to_float(x[i]);
}
EXPORT float_to_bfloat16(const float* x, dlm::BFloat16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::from_float<dlm::BFloat16>(x[i]);
}
EXPORT exp_normal(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::exp_normal(x[i]);
}
EXPORT gumbel(const uint32_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::gumbel(x[i]);
}
EXPORT chunk_exp(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::chunk_exp(x[i]);
}
EXPORT fma_rn(const float* abc, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = dlm::fma_rn(abc[3 * i], abc[3 * i + 1], abc[3 * i + 2]);
}
EXPORT chunk_sum(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float chunk[dlm::kRaceChunk];
    std::copy_n(x + i * dlm::kRaceChunk, dlm::kRaceChunk, chunk);
    y[i] = dlm::chunk_sum(chunk);
  }
}
// counter: position, step, stream, index / 4
EXPORT philox(const uint32_t* counter, uint32_t* word, int64_t n, uint64_t seed) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t* c = counter + 4 * i;
    const dlm::Philox4 random = dlm::philox(seed, c[0], c[1], dlm::Stream(c[2]), c[3]);
    for (int j = 0; j < 4; ++j) word[4 * i + j] = random.word[j];
  }
}
