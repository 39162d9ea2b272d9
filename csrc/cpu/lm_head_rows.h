// SPDX-License-Identifier: Apache-2.0
// Hidden states as rows of logits: packs them, multiplies them by parts of an LM head, and
// multiplies the chunks of a single row again. In an anonymous namespace, for the files that
// process rows in slices.
#pragma once
#include <algorithm>

#include "cpu/lm_head_confidence.h"
#include "cpu/token_confidence_rows.h"

namespace dlm::cpu {
namespace {

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
bool is_guided(const LmHeadConfidenceParams& p) { return p.uncond_hidden != nullptr; }

// The address of element 0 of an array whose element `first` is at `at`.
template <class T>
T* before(T* at, int64_t first) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(at) - uintptr_t(first) * sizeof(T));
}
const void* before(const void* at, int64_t first, DType dtype) {
  return before(static_cast<const char*>(at), first * element_size(dtype));
}

// Packs the hidden states of used rows [begin, end) for the kernels.
void pack(const LmHeadConfidenceParams& p, const void* hidden, int64_t stride, int64_t begin,
          int64_t end, uint32_t* to) {
  const LmHeadKernels kernels = lm_head_kernels(p.rows.dtype);
  constexpr int64_t kGroup = 2 * kHeadLanes;
  for (int64_t first = begin; first < end; first += kGroup, to += kGroup * kernels.words(p.D)) {
    const void* rows[kGroup] = {};
    const int64_t n = std::min(kGroup, end - first);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t n = p.output_row(first + i);
      const int64_t source = p.rows.row_map ? p.rows.row_map[n] : n;
      if (source < 0) continue;
      rows[i] = static_cast<const char*>(hidden) + source * stride * element_size(p.rows.dtype);
    }
    kernels.pack(rows, p.D, up_to(n, kHeadLanes), to);
  }
}

// Computes the logits of tokens [first, last) for packed rows.
void multiply(const LmHeadConfidenceParams& p, const LmHeadKernels& kernels, const uint32_t* packed,
              int64_t rows, int64_t first, int64_t last, char* out, int64_t out_stride) {
  const int64_t size = element_size(p.rows.dtype);
  for (int64_t v = first; v < last; v += kernels.tokens) {
    const char* weight = static_cast<const char*>(p.weight) + v * p.weight_stride * size;
    kernels.multiply(packed, rows, weight, p.weight_stride, std::min(kernels.tokens, last - v), p.D,
                     out + (v - first) * size, out_stride);
  }
}

// One row whose chunks can be multiplied again.
class Multiplied final : public ChunkMaker {
 public:
  Multiplied(const LmHeadConfidenceParams& p, LogitsRow& row, int64_t i, char* scratch)
      : p_(p),
        row_(row),
        kernels_(lm_head_kernels(p.rows.dtype)),
        packed_(reinterpret_cast<uint32_t*>(scratch)),
        uncond_packed_(packed_ + kHeadLanes * kernels_.words(p.D)) {
    pack(p, p.hidden, p.hidden_stride, i, i + 1, packed_);
    if (is_guided(p)) pack(p, p.uncond_hidden, p.uncond_stride, i, i + 1, uncond_packed_);
  }
  static int64_t bytes(const LmHeadConfidenceParams& p) {
    const int64_t words = kHeadLanes * lm_head_kernels(p.rows.dtype).words(p.D);
    return words * int64_t(sizeof(uint32_t)) * (is_guided(p) ? 2 : 1);
  }

  void make(int64_t chunk) override {
    if (chunk == made_) return;
    made_ = chunk;
    const int64_t first = chunk * kRaceChunk, last = std::min(first + kRaceChunk, p_.rows.V);
    multiply(p_, kernels_, packed_, 1, first, last, logits_, kRaceChunk);
    row_.logits = before(logits_, first, row_.dtype);
    if (!is_guided(p_)) return;
    multiply(p_, kernels_, uncond_packed_, 1, first, last, uncond_logits_, kRaceChunk);
    row_.uncond = before(uncond_logits_, first, row_.dtype);
  }

 private:
  const LmHeadConfidenceParams& p_;
  LogitsRow& row_;
  const LmHeadKernels kernels_;
  uint32_t *const packed_, *const uncond_packed_;
  int64_t made_ = -1;
  alignas(64) char logits_[kRaceChunk * sizeof(float)];
  alignas(64) char uncond_logits_[kRaceChunk * sizeof(float)];
};

}  // namespace
}  // namespace dlm::cpu
