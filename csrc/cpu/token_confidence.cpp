// SPDX-License-Identifier: Apache-2.0
// token = argmax z, or drawn by a race (common/race.h); its probability, and the statistics of
// softmax(z) or softmax(z/T). One pass over a row of logits computes the sums of its chunks
// (token_confidence.h); everything else follows from these, and reads only a few chunks again. For
// x_v = (z_v - max) / T and all v except the argmax,
//   S = sum of e^x_v,   X = sum of x_v e^x_v
// so that 1 - confidence = S / (1 + S) and entropy = log(1 + S) - X / (1 + S) keep their relative
// accuracy in peaked rows, which matter most for decisions.
#include "cpu/token_confidence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/math.h"
#include "cpu/isa.h"
#include "cpu/token_confidence_rows.h"

namespace dlm::cpu {
namespace {

struct Chosen {
  TokenConfidenceKernels (*kernels)();
  int64_t grain;
};

constexpr ForIsa<Chosen> kTable[] = {
    {Isa::kGeneric, {generic::token_confidence, 8192}},
#ifdef DLM_X86
    {Isa::kAvx2, {avx2::token_confidence, 16384}},
    {Isa::kAvx512, {avx512::token_confidence, 32768}},
#endif
};

const void* row_of(const void* data, int64_t row, int64_t stride, DType dtype) {
  return data ? static_cast<const char*>(data) + row * stride * element_size(dtype) : nullptr;
}
// The n-th row's part of a tensor of which each `size` elements serve the same number of rows.
// (Divisions are slow compared with a row of few logits.)
template <class T>
const T* shared(const T* data, int64_t n, int64_t rows, int64_t size) {
  return data ? data + n / rows * size : nullptr;
}

// Processes rows one after the other.
struct Rows {
  const TokenConfidenceKernels& kernels;
  const TokenConfidenceParams& p;
  float* sums;
  void* scratch;

  void measure(int64_t n, Task& task) const {
    int32_t flags = 0;
    const RowSums own(sums, n, p.V, task);
    if (task.source >= 0) {
      flags =
          kernels.sum_chunks(task.row, first_chunk(p), chunks_of(p.V), task.wanted(), own.of_chunk);
    }
    Row(kernels, p, n, task, own, scratch).finish(flags);
  }
};

// Processes rows of few logits together; filtered rows are processed singly.
class Few {
 public:
  explicit Few(const Rows& others) : others_(others), kernels_(others.kernels), p_(others.p) {
    rows_.entropy = p_.entropy != nullptr;
  }

  void add(int64_t n) {
    const int i = rows_.count;
    const Task& task = task_[i].emplace(p_, n);  // in place: a copy would take longer than the rest
    if (task.filters || task.source < 0) return others_.measure(n, *task_[i]);
    number_[i] = n;
    rows_.row[i] = &task.row;
    rows_.scale[i] = task.scale;
    rows_.given[i] = p_.given ? p_.given[n] : -1;
    if (++rows_.count == kRowsTogether) finish();
  }

  void finish() {
    if (rows_.count == 0) return;
    kernels_.measure_rows(rows_);
    for (int i = 0; i < rows_.count; ++i) write(i);
    rows_.count = 0;
  }

 private:
  void write(int i) {
    const int64_t n = number_[i];
    const bool any = rows_.argmax[i] >= 0;
    int64_t token = rows_.argmax[i];
    float confidence = rows_.confidence[i];
    if (any && task_[i]->samples) {
      const Drawn drawn = kernels_.race_tokens(*rows_.row[i], 0, task_[i]->draw);
      const double exponent = (double(drawn.logit) - rows_.max[i]) * rows_.scale[i];
      token = drawn.token;
      confidence = float(std::exp(exponent) / (1.0 + double(rows_.weight[i])));
    }
    p_.token[n] = token;
    p_.argmax[n] = rows_.argmax[i];
    p_.flags[n] = rows_.flags[i] | (any ? 0 : kFlagNothingAllowed);
    p_.confidence[n] = any ? confidence : -kInfinity;
    p_.logsumexp[n] = any ? rows_.logsumexp[i] : -kInfinity;
    p_.p_given[n] = any ? rows_.p_given[i] : 0.0f;
    if (p_.margin) p_.margin[n] = any ? rows_.margin[i] : 0.0f;
    if (p_.entropy) p_.entropy[n] = any ? rows_.of_entropy[i] : 0.0f;
    if (p_.floor) p_.floor[n] = -kInfinity;
  }

  const Rows& others_;
  const TokenConfidenceKernels& kernels_;
  const TokenConfidenceParams& p_;
  FewRows rows_;
  std::optional<Task> task_[kRowsTogether];
  int64_t number_[kRowsTogether];
};

}  // namespace

LogitsRow logits_row(const TokenConfidenceParams& p, int64_t n, int64_t source) {
  return {p.dtype,
          p.V,
          row_of(p.logits, source, p.logits_stride, p.dtype),
          row_of(p.uncond_logits, source, p.uncond_stride, p.dtype),
          p.cfg_scale.at(n, 0.0f) + 1.0f,
          shared(p.bias, n, p.bias_rows_per_value, p.columns()),
          shared(p.banned, n, p.banned_rows_per_value, p.banned_count),
          p.banned_count,
          shared(p.bitmask, n, p.bitmask_rows_per_value, p.bitmask_words),
          -kInfinity};
}

TokenConfidenceKernels token_confidence_kernels() {
  return best_for(isa(), kTable).kernels.kernels();
}

Isa token_confidence_isa(Isa isa) { return best_for(isa, kTable).isa; }

int64_t token_confidence_grain() { return best_for(isa(), kTable).kernels.grain; }

int64_t token_confidence_sums(int64_t V) { return RowSums::floats(V); }

int64_t token_confidence_scratch(int64_t V) { return FloorScratch::bytes(V); }

void token_confidence(const TokenConfidenceParams& p, float* sums, void* scratch, int64_t begin,
                      int64_t end) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const Rows rows{kernels, p, sums, scratch};
  if (kernels.measure_rows && p.V <= kFewLogits && !p.partial) {
    Few few(rows);
    for (int64_t n = begin; n < end; ++n) few.add(n);
    few.finish();
    return;
  }
  for (int64_t n = begin; n < end; ++n) {
    Task task(p, n);
    rows.measure(n, task);
  }
}

void token_confidence_scan(const TokenConfidenceParams& p, float* sums, int64_t begin,
                           int64_t end) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  const int64_t parts = token_confidence_parts(p), chunks = chunks_of(p.V);
  constexpr int64_t kChunks = kPart / kRaceChunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / parts, part = i % parts + p.first / kPart;
    const Task task(p, n);
    if (task.source < 0) continue;
    const RowSums own(sums, n, p.V, task);
    own.flags[part] = float(kernels.sum_chunks(task.row, std::max(part * kChunks, first_chunk(p)),
                                               std::min((part + 1) * kChunks, chunks),
                                               task.wanted(), own.of_chunk));
  }
}

void token_confidence_finish(const TokenConfidenceParams& p, float* sums, void* scratch,
                             int64_t begin, int64_t end) {
  const TokenConfidenceKernels kernels = token_confidence_kernels();
  for (int64_t n = begin; n < end; ++n) {
    Task task(p, n);
    const RowSums own(sums, n, p.V, task);
    int32_t flags = 0;
    for (int64_t i = p.first / kPart; i < token_confidence_parts(p.V) && task.source >= 0; ++i)
      flags |= int32_t(own.flags[i]);
    Row(kernels, p, n, task, own, scratch).finish(flags);
  }
}

}  // namespace dlm::cpu
