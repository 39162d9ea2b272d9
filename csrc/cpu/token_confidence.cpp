// SPDX-License-Identifier: Apache-2.0
// token = argmax z, or drawn by a race (common/race.h); its probability, and the statistics of
// softmax(z) or softmax(z/T), from one pass over a row of logits. For x_v = (z_v - max) / T and all
// v but the argmax,
//   S = sum of e^x_v,   X = sum of x_v e^x_v
// so that 1 - confidence = S / (1 + S) and entropy = log(1 + S) - X / (1 + S) keep their relative
// accuracy in peaked rows, where decisions fall. Here: a row's plan, the merging of its parts, the
// search for the filters' floor, the statistics. The loops over logits are the kernels'.
#include "cpu/token_confidence.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/math.h"
#include "common/order.h"
#include "cpu/isa.h"

namespace dlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

struct Kernel {
  ScanKernel scan;
  MeasureKernel add_measures;
  RaceKernel race_tokens;
  FewKernel measure_rows;
  int64_t grain;
};

constexpr ForIsa<Kernel> kTable[] = {
    {Isa::kGeneric, {generic::scan, generic::add_measures, generic::race_tokens, nullptr, 8192}},
#ifdef DLM_X86
    {Isa::kAvx2, {avx2::scan, avx2::add_measures, avx2::race_tokens, avx2::measure_rows, 16384}},
    {Isa::kAvx512,
     {avx512::scan, avx512::add_measures, avx2::race_tokens, avx2::measure_rows, 32768}},
#endif
};
Kernel kernel() { return best_for(isa(), kTable).kernels; }

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const void* row_of(const void* data, int64_t row, int64_t stride, DType dtype) {
  return data ? static_cast<const char*>(data) + row * stride * element_size(dtype) : nullptr;
}
// What the n-th row has of a tensor that serves so many rows with each `size` elements. (Divisions
// are slow beside a row of few logits.)
template <class T>
const T* shared(const T* data, int64_t n, int64_t rows, int64_t size) {
  return data ? data + n / rows * size : nullptr;
}

// What output row n reads and asks for.
struct Task {
  Task(const TokenConfidenceParams& p, int64_t n)
      : source(p.row_map ? p.row_map[n] : n),
        row{p.dtype,
            p.V,
            row_of(p.logits, std::max<int64_t>(source, 0), p.logits_stride, p.dtype),
            row_of(p.uncond_logits, std::max<int64_t>(source, 0), p.uncond_stride, p.dtype),
            p.cfg_scale.at(n, 0.0f) + 1.0f,
            shared(p.bias, n, p.bias_rows_per_value, p.V),
            shared(p.banned, n, p.banned_rows_per_value, p.banned_count),
            p.banned_count,
            shared(p.bitmask, n, p.bitmask_rows_per_value, p.bitmask_words),
            -kInfinity} {
    const float asked = p.temperature.at(n, 0.0f);
    samples = asked > 0.0f;
    temperature = samples ? asked : 1.0f;
    draw.inverse_temperature = 1.0f / temperature;
    if (samples) {
      draw.seed = uint64_t(p.random.seed.at(n, 0));
      draw.position = uint32_t(p.random.position[n]);
      draw.step = uint32_t(p.random.step.at(n, 0));
      draw.redraw = uint32_t(p.random.redraw.at(n, 0));
    }
    k = p.top_k.at(n, 0);
    p_kept = p.top_p.at(n, 1.0f);
    about_kept = p.distribution == Distribution::kFiltered;
    filters = (k > 0 || p_kept < 1.0f) && (samples || about_kept);
    scale = p.distribution == Distribution::kRaw ? 1.0f : draw.inverse_temperature;
    second = p.margin != nullptr;
    entropy = p.entropy != nullptr;
  }

  Wanted statistics() const { return {second, true, entropy, samples, scale, draw}; }
  Wanted maximum() const { return {false, false, false, samples, 1.0f, draw}; }
  // Of the first scan; filters need its maximum before there is a sample.
  Wanted first() const {
    Wanted want = filters && about_kept ? maximum() : statistics();
    want.sample = samples && !filters;
    return want;
  }

  int64_t source;
  LogitsRow row;
  bool samples, filters, about_kept, second, entropy;
  float temperature, scale;  // scale: of what the statistics are about
  Draw draw{};
  int32_t k;
  float p_kept;
};

// `found`, and then the part that comes after it: their union.
void merge(Scan& found, const Scan& part, double scale) {
  if (part.key > found.key) {
    found.key = part.key;
    found.chunk = part.chunk;
  }
  found.flags |= part.flags;
  if (part.argmax < 0) return;
  if (found.argmax < 0) {
    found.max = part.max;
    found.second = part.second;
    found.argmax = part.argmax;
    found.weight = part.weight;
    found.weighted_exponent = part.weighted_exponent;
    return;
  }
  // The one with the lower maximum is put relative to the higher one; its own becomes a term.
  const auto rescaled = [scale](const Scan& low, const Scan& high, Scan* sum) {
    const double exponent = (double(low.max) - double(high.max)) * scale;
    const double factor = std::exp(exponent), weight = low.weight + 1.0;
    sum->weighted_exponent =
        high.weighted_exponent + factor * (low.weighted_exponent + exponent * weight);
    sum->weight = high.weight + factor * weight;
  };
  if (part.max > found.max) {
    rescaled(found, part, &found);
    found.second = std::max(found.max, part.second);
    found.max = part.max;
    found.argmax = part.argmax;
  } else {
    rescaled(part, found, &found);
    found.second = std::max(found.second, part.max);
  }
}

Scan scan_row(const Kernel& kernel, const LogitsRow& row, const Wanted& want) {
  Scan found;
  for (int64_t begin = 0; begin < row.V; begin += kPart) {
    merge(found, kernel.scan(row, begin, std::min(begin + kPart, row.V), want), want.scale);
  }
  return found;
}

// --- filters -----------------------------------------------------------------------------------

float value_of(uint32_t ordered) {
  return bits_to_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The highest bin such that it and those above it sum to more than the limit, -1 if there is none;
// `above` becomes the sum of those above it.
int highest_over(const uint64_t* bins, uint64_t limit, uint64_t& above) {
  uint64_t sum = above;
  for (int b = kBins - 1; b >= 0; --b) {
    if (sum + bins[b] > limit) {
      above = sum;
      return b;
    }
    sum += bins[b];
  }
  return -1;
}

// The largest value such that it and what lies above it measure more than the limit (a count, or a
// share of all mass), as ordered bits; 0: there is none. `lowest`: no lower value can be the one.
// A radix search over the ordered bits between `lowest` and the maximum, 11 bits a pass.
uint32_t crossing(const Kernel& kernel, const LogitsRow& row, const Measure& measure, double limit,
                  float lowest) {
  uint64_t sum[kBins], total = 0, above = 0, over = uint64_t(measure.mass ? 0.0 : limit);
  const uint32_t low = ordered_bits(std::max(lowest, -kLargest)), high = ordered_bits(measure.max);
  Bins bins{low, low, high, 0, sum, measure.mass ? &total : nullptr};
  while ((high - low) >> bins.shift >= uint32_t(kBins)) ++bins.shift;
  for (bool first = true;; first = false) {
    std::fill(sum, sum + kBins, 0);
    // The first pass of a count goes in growing steps: what is known to have enough above it need
    // not be counted in the next.
    const bool rises = first && !measure.mass;
    int64_t step = rises ? 1024 : row.V;
    for (int64_t begin = 0; begin < row.V; begin += step, step = begin) {
      kernel.add_measures(row, begin, std::min(begin + step, row.V), measure, bins);
      if (!rises) break;
      uint64_t ignored = 0;
      const int bin = highest_over(sum, over, ignored);
      if (bin >= 0) bins.lowest = bins.base + (uint32_t(bin) << bins.shift);
    }
    if (first && measure.mass) over = uint64_t(limit * double(total));
    const int bin = highest_over(sum, over, above);
    if (bin < 0) return 0;  // in the first pass only: sums are exact
    bins.base += uint32_t(bin) << bins.shift;
    if (bins.shift == 0) return bins.base;
    bins.lowest = bins.base;
    bins.highest = bins.base + ((1u << bins.shift) - 1);
    bins.shift = std::max(0, bins.shift - kBinBits);
    bins.total = nullptr;
  }
}

// The lowest value kept. Both filters keep whatever is at or above a value, so the higher of the
// two decides.
float filter_floor(const Kernel& kernel, const TokenConfidenceParams& p, const Task& task,
                   float max) {
  LogitsRow row = task.row;
  const float scale = 1.0f / task.temperature;
  float by_count = -kInfinity, by_mass = -kInfinity;
  if (task.k > 0 && task.k < row.V) {
    const Measure count{false, max, scale};
    const uint32_t kth = crossing(kernel, row, count, double(task.k) - 1.0, -kInfinity);
    if (kth) by_count = value_of(kth);
  }
  if (task.p_kept < 1.0f) {
    if (!p.top_p_first) row.floor = by_count;  // the mass of what top-k left
    // The weight of V logits below this is less than (1 - p) of the maximum's alone.
    const double depth = std::log(double(row.V) / (1.0 - double(task.p_kept))) + 0.1;
    const float lowest = float(double(max) - depth * double(task.temperature));
    const Measure mass{true, max, scale};
    const uint32_t crossed = crossing(kernel, row, mass, double(task.p_kept), lowest);
    if (crossed)
      by_mass = p.keep_crossing ? value_of(crossed) : std::min(value_of(crossed + 1), max);
  }
  return std::max(by_count, by_mass);
}

// --- rows --------------------------------------------------------------------------------------

template <class T>
float element(const void* data, int64_t at) {
  return to_float(static_cast<const T*>(data)[at]);
}
float element(DType dtype, const void* data, int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return element<float>(data, at);
    case DType::kBFloat16:
      return element<BFloat16>(data, at);
    default:
      return element<Float16>(data, at);
  }
}

// One effective logit, by the same arithmetic as in the kernels.
float logit_at(const LogitsRow& row, int64_t v) {
  float z = element(row.dtype, row.logits, v);
  if (row.uncond) {
    const float u = element(row.dtype, row.uncond, v);
    z = u + row.guidance * (z - u);
  }
  if (row.bias) z += row.bias[v];
  if (!(z >= row.floor)) return -kInfinity;
  for (int64_t i = 0; row.banned && i < row.banned_count; ++i) {
    if (row.banned[i] == v) return -kInfinity;
  }
  if (row.bitmask && !(uint32_t(row.bitmask[v / 32]) >> v % 32 & 1)) return -kInfinity;
  return std::min(z, kLargest);
}

void finish(const Kernel& kernel, const TokenConfidenceParams& p, int64_t n, Task& task,
            Scan found) {
  LogitsRow& row = task.row;
  if (p.floor) p.floor[n] = -kInfinity;
  Drawn drawn{-1, -kInfinity};
  const auto race = [&] {
    if (found.chunk >= 0) drawn = kernel.race_tokens(row, found.chunk, task.draw);
  };
  if (!task.filters) {
    race();
  } else if (found.argmax >= 0) {
    row.floor = filter_floor(kernel, p, task, found.max);
    if (p.floor) p.floor[n] = row.floor;
    if (p.distribution == Distribution::kFiltered) {
      const int32_t flags = found.flags;
      found = scan_row(kernel, row, task.statistics());
      found.flags |= flags;
      race();
    } else {
      found.chunk = scan_row(kernel, row, task.maximum()).chunk;
      race();
      row.floor = -kInfinity;  // the statistics, p_given too, are about the whole row
    }
  }

  int64_t token = -1;
  double confidence = -kInfinity, margin = 0.0, entropy = 0.0, logsumexp = -kInfinity,
         p_given = 0.0;
  if (task.source >= 0 && found.argmax < 0) {
    found.flags |= kFlagNothingAllowed;
  } else if (found.argmax >= 0) {
    const bool sampled = drawn.token >= 0;
    token = sampled ? drawn.token : found.argmax;
    const double scale =
        p.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(task.temperature);
    const double total = 1.0 + found.weight, log_total = std::log1p(found.weight);
    const auto exponent = [&](float logit) { return (double(logit) - found.max) * scale; };
    confidence = sampled ? std::exp(exponent(drawn.logit)) / total : 1.0 / total;
    margin = -std::expm1(exponent(found.second)) / total;
    entropy = log_total - found.weighted_exponent / total;
    logsumexp = found.max * scale + log_total;
    if (p.given && p.given[n] >= 0) p_given = std::exp(exponent(logit_at(row, p.given[n]))) / total;
  }

  p.token[n] = token;
  p.argmax[n] = found.argmax;
  p.flags[n] = found.flags;
  p.confidence[n] = float(confidence);
  p.logsumexp[n] = float(logsumexp);
  p.p_given[n] = float(p_given);
  if (p.margin) p.margin[n] = float(margin);
  if (p.entropy) p.entropy[n] = float(entropy);
}

void measure(const Kernel& kernel, const TokenConfidenceParams& p, int64_t n, Task& task) {
  finish(kernel, p, n, task, task.source < 0 ? Scan{} : scan_row(kernel, task.row, task.first()));
}

// Rows of few logits, measured together; those that are filtered, alone.
class Few {
 public:
  Few(const Kernel& kernel, const TokenConfidenceParams& p) : kernel_(kernel), p_(p) {
    rows_.entropy = p.entropy != nullptr;
  }

  void add(int64_t n) {
    const int i = rows_.count;
    const Task& task = task_[i].emplace(p_, n);  // in place: a copy would take longer than the rest
    if (task.filters || task.source < 0) return measure(kernel_, p_, n, *task_[i]);
    number_[i] = n;
    rows_.row[i] = &task.row;
    rows_.scale[i] = task.scale;
    rows_.given[i] = p_.given ? p_.given[n] : -1;
    if (++rows_.count == kRowsTogether) finish();
  }

  void finish() {
    if (rows_.count == 0) return;
    kernel_.measure_rows(rows_);
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
      const Drawn drawn = kernel_.race_tokens(*rows_.row[i], 0, task_[i]->draw);
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

  const Kernel& kernel_;
  const TokenConfidenceParams& p_;
  FewRows rows_;
  std::optional<Task> task_[kRowsTogether];
  int64_t number_[kRowsTogether];
};

}  // namespace

Isa token_confidence_isa(Isa isa) { return best_for(isa, kTable).isa; }

int64_t token_confidence_grain() { return kernel().grain; }

void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end) {
  const Kernel chosen = kernel();
  if (chosen.measure_rows && p.V <= kFewLogits) {
    Few few(chosen, p);
    for (int64_t n = begin; n < end; ++n) few.add(n);
    few.finish();
    return;
  }
  for (int64_t n = begin; n < end; ++n) {
    Task task(p, n);
    measure(chosen, p, n, task);
  }
}

void token_confidence_scan(const TokenConfidenceParams& p, Scan* parts, int64_t begin,
                           int64_t end) {
  const Kernel chosen = kernel();
  const int64_t count = token_confidence_parts(p.V);
  for (int64_t i = begin; i < end; ++i) {
    const Task task(p, i / count);
    const int64_t first = i % count * kPart;
    parts[i] = task.source < 0
                   ? Scan{}
                   : chosen.scan(task.row, first, std::min(first + kPart, p.V), task.first());
  }
}

void token_confidence_finish(const TokenConfidenceParams& p, const Scan* parts, int64_t begin,
                             int64_t end) {
  const Kernel chosen = kernel();
  const int64_t count = token_confidence_parts(p.V);
  for (int64_t n = begin; n < end; ++n) {
    Task task(p, n);
    Scan found;
    for (int64_t i = 0; i < count; ++i) merge(found, parts[n * count + i], task.first().scale);
    finish(chosen, p, n, task, found);
  }
}

}  // namespace dlm::cpu
