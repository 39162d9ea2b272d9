// SPDX-License-Identifier: Apache-2.0
// What an output row of token_confidence requests, and how its results follow from the sums of its
// chunks. In an anonymous namespace, for the files that measure rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/shard.h"
#include "cpu/shard_confidence.h"
#include "cpu/token_confidence.h"
#include "cpu/token_confidence_filter.h"

namespace dlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

int64_t chunks_of(int64_t V) { return (V + kRaceChunk - 1) / kRaceChunk; }
int64_t first_chunk(const TokenConfidenceParams& p) { return p.first / kRaceChunk; }

// The inputs and requests of output row n.
struct Task {
  Task(const TokenConfidenceParams& p, int64_t n)
      : source(p.row_map ? p.row_map[n] : n), row(logits_row(p, n, std::max<int64_t>(source, 0))) {
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
    entropy = p.entropy != nullptr;
  }

  // Top-p needs the total mass at the row's temperature.
  Wanted wanted() const {
    const bool tempered = filters && p_kept < 1.0f && scale != draw.inverse_temperature;
    return {entropy, tempered, scale, draw.inverse_temperature};
  }

  int64_t source;
  LogitsRow row;
  bool samples, filters, about_kept, entropy;
  float temperature, scale;  // scale: 1 / T of the statistics' distribution
  Draw draw{};
  int32_t k;
  float p_kept;
};

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

// Working memory of a row: arrays over its chunks, then flags of its parts. If weights at another
// temperature than that of the statistics are not needed, or the temperatures are equal, the two
// arrays are the same.
struct RowSums {
  ChunkSums of_chunk;
  float *key, *bound;  // of the race
  float* flags;        // integers

  static int64_t floats(int64_t V) { return 6 * chunks_of(V) + token_confidence_parts(V); }
  RowSums(float* sums, int64_t n, int64_t V, const Task& task) {
    const int64_t chunks = chunks_of(V);
    float* own = sums + n * floats(V);
    float* weight = own + chunks;
    of_chunk = {own, weight, weight + chunks,
                task.wanted().tempered ? weight + 2 * chunks : weight};
    key = own + 4 * chunks;
    bound = key + chunks;
    flags = bound + chunks;
  }
};

// For logits that are not in memory: computes those of one chunk of the row at a time, and sets the
// row's pointers to them.
struct ChunkMaker {
  virtual void make(int64_t chunk) = 0;

 protected:
  ~ChunkMaker() = default;
};

// A row, from the sums of its chunks to its results.
class Row {
 public:
  // `maker` is null if all logits are in memory; otherwise rows are not filtered.
  Row(const TokenConfidenceKernels& kernels, const TokenConfidenceParams& p, int64_t n, Task& task,
      const RowSums& memory, void* scratch, ChunkMaker* maker = nullptr)
      : kernels_(kernels),
        p_(p),
        n_(n),
        task_(task),
        row_(task.row),
        memory_(memory),
        sums_(memory.of_chunk),
        scratch_(scratch),
        maker_(maker) {}

  void finish(int32_t flags) {
    if (p_.partial) return finish_shard(flags);
    Summary found = summarize();
    Drawn drawn{-1, -kInfinity};
    if (found.argmax >= 0) {
      if (task_.filters) {
        row_.floor = floor(found.max);
        if (task_.about_kept) {
          sum_kept();
          found = summarize();
        }
      }
      if (task_.samples) drawn = race();
    }
    if (p_.floor) p_.floor[n_] = row_.floor;
    if (!task_.about_kept) row_.floor = -kInfinity;  // the statistics describe the whole row
    if (found.argmax < 0 && task_.source >= 0) flags |= kFlagNothingAllowed;
    write(found, drawn, flags);
  }

 private:
  Summary summarize() const {
    if (task_.source < 0) return {};
    if (maker_) {  // the chunk that contains the argmax is read again
      const int64_t chunks = chunks_of(row_.V);
      maker_->make(std::max_element(sums_.largest, sums_.largest + chunks) - sums_.largest);
    }
    return kernels_.summarize(row_, sums_, task_.entropy, task_.scale);
  }

  float floor(float max) const {
    FloorScratch scratch(scratch_, row_.V);
    FloorSearch search(kernels_, row_, sums_.largest, sums_.tempered, max,
                       task_.draw.inverse_temperature, scratch);
    float by_count = -kInfinity, by_mass = -kInfinity;
    if (task_.k > 0 && task_.k < row_.V) by_count = search.of_count(task_.k);
    if (task_.p_kept < 1.0f) {
      by_mass = search.of_share(task_.p_kept, p_.top_p_first ? -kInfinity : by_count);
      if (by_mass > -kInfinity && !p_.keep_crossing)
        by_mass = std::min(ordered_value(ordered_bits(by_mass) + 1), max);
    }
    return std::max(by_count, by_mass);
  }

  // Writes the summary of a row over a shard. Chunks before the shard have no weight in the race.
  void finish_shard(int32_t flags) {
    const int64_t chunks = chunks_of(row_.V), first = first_chunk(p_);
    int64_t* const words = p_.partial + n_ * kShardWords;
    std::fill(words, words + kShardWords, 0);
    words[kShardArgmax] = words[kShardToken] = -1;
    words[kShardFlags] = task_.source < 0 ? kFlagUnused : flags;
    words[kShardLargest] = two_floats(-kInfinity, -kInfinity);
    words[kShardDrawn] = two_floats(-kInfinity, -kInfinity);
    if (task_.source < 0) return;
    std::fill(sums_.largest, sums_.largest + first, -kInfinity);
    std::fill(sums_.weight, sums_.weight + first, 0.0f);
    const int64_t own = std::max_element(sums_.largest, sums_.largest + chunks) - sums_.largest;
    const float max = sums_.largest[own];
    if (!(max > -kInfinity)) return;

    alignas(64) float z[kRaceChunk];
    if (maker_) maker_->make(own);
    kernels_.load_chunk(row_, own, z);
    float* const at = std::find(z, z + kRaceChunk, max);
    *at = -kInfinity;
    float second = *std::max_element(z, z + kRaceChunk);
    for (int64_t c = first; c < chunks; ++c)
      second = c == own ? second : std::max(second, sums_.largest[c]);
    const Sums rest = kernels_.sum_chunk(z, max, task_.scale);
    const float exponent = task_.entropy ? sums_.exponent[own] : 0.0f;
    words[kShardArgmax] = own * kRaceChunk + (at - z);
    words[kShardLargest] = two_floats(max, second);
    words[kShardWeight] = two_floats(sums_.weight[own], rest.weight);
    words[kShardExponent] = two_floats(exponent, task_.entropy ? rest.exponent : 0.0f);
    const ChunkSums others{sums_.largest, sums_.weight, task_.entropy ? sums_.exponent : nullptr,
                           nullptr};
    add_shard_chunks(others, first, own, exact_scale(), max, words);
    add_shard_chunks(others, own + 1, chunks, exact_scale(), max, words);

    if (task_.samples) {
      const Drawn drawn = race();
      words[kShardToken] = drawn.token;
      if (drawn.token >= 0)
        words[kShardDrawn] = two_floats(key_of(drawn.token / kRaceChunk), drawn.logit);
    }
    const int64_t given = p_.given ? p_.given[n_] : -1;
    if (given >= p_.first && given < p_.V) {
      if (maker_) maker_->make(given / kRaceChunk);
      words[kShardGiven] = two_floats(logit_at(row_, given), bits_to_float(1));
    }
  }

  // 1 / T of the distribution that the statistics describe.
  double exact_scale() const {
    return p_.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(task_.temperature);
  }

  // Recomputes the sums for what the filters keep.
  void sum_kept() {
    const Wanted want{task_.entropy, false, task_.scale, task_.scale};
    for (int64_t c = 0; c < chunks_of(row_.V); ++c) {
      if (sums_.largest[c] >= row_.floor) {
        kernels_.sum_chunks(row_, c, c + 1, want, sums_);
      } else {
        sums_.largest[c] = -kInfinity;
        sums_.weight[c] = sums_.exponent[c] = 0.0f;
      }
    }
  }

  // If the chunks' sums are not those of the race (they are at another temperature, or include what
  // the filters dropped), they are upper bounds of them, and so bound the keys. The sums are then
  // recomputed, starting with the chunk with the highest bound, until a key exceeds all other
  // bounds.
  Drawn race() const {
    const Draw& draw = task_.draw;
    const bool exact =
        task_.scale == draw.inverse_temperature && (row_.floor == -kInfinity || task_.about_kept);
    const int64_t chunks = chunks_of(row_.V);
    float *const key = memory_.key, *const bound = memory_.bound;
    if (exact) {
      kernels_.chunk_keys(sums_.largest, sums_.weight, chunks, draw, key);
    } else {
      constexpr float kRounding = 1.0001f;
      const bool known = task_.wanted().tempered, colder = draw.inverse_temperature >= task_.scale;
      for (int64_t c = 0; c < chunks; ++c)
        bound[c] = (known || colder ? sums_.tempered[c] : float(kRaceChunk)) * kRounding;
      kernels_.chunk_keys(sums_.largest, bound, chunks, draw, key);
      for (int64_t c = 0; c < chunks; ++c)
        key[c] = sums_.largest[c] >= row_.floor ? key[c] : -kInfinity;
    }
    for (int64_t last = -1;;) {
      const int64_t best = std::max_element(key, key + chunks) - key;
      if (!(key[best] > -kInfinity)) return {-1, -kInfinity};
      if (maker_) maker_->make(best);
      if (exact || best == last) return kernels_.race_tokens(row_, best, draw);
      key[best] = key_of(best);
      last = best;
    }
  }

  float key_of(int64_t chunk) const {
    const Draw& draw = task_.draw;
    alignas(64) float z[kRaceChunk];
    kernels_.load_chunk(row_, chunk, z);
    const float largest = sums_.largest[chunk];
    const float weight = kernels_.sum_chunk(z, largest, draw.inverse_temperature).weight;
    const Philox4 random = philox(draw.seed, draw.position, draw.step,
                                  redrawn(Stream::kChunk, draw.redraw), uint32_t(chunk / 4));
    return chunk_key(largest, draw.inverse_temperature, weight, random.word[chunk % 4]);
  }

  void write(const Summary& found, const Drawn& drawn, int32_t flags) const {
    int64_t token = -1;
    double confidence = -kInfinity, margin = 0.0, entropy = 0.0, logsumexp = -kInfinity,
           p_given = 0.0;
    if (found.argmax >= 0) {
      const bool sampled = drawn.token >= 0;
      token = sampled ? drawn.token : found.argmax;
      const double scale = exact_scale();
      const double total = 1.0 + found.weight, log_total = std::log1p(found.weight);
      const auto exponent = [&](float logit) { return (double(logit) - found.max) * scale; };
      confidence = sampled ? std::exp(exponent(drawn.logit)) / total : 1.0 / total;
      margin = -std::expm1(exponent(found.second)) / total;
      entropy = log_total - found.exponent / total;
      logsumexp = found.max * scale + log_total;
      if (p_.given && p_.given[n_] >= 0) {
        if (maker_) maker_->make(p_.given[n_] / kRaceChunk);
        p_given = std::exp(exponent(logit_at(row_, p_.given[n_]))) / total;
      }
    }
    p_.token[n_] = token;
    p_.argmax[n_] = found.argmax;
    p_.flags[n_] = flags;
    p_.confidence[n_] = float(confidence);
    p_.logsumexp[n_] = float(logsumexp);
    p_.p_given[n_] = float(p_given);
    if (p_.margin) p_.margin[n_] = float(margin);
    if (p_.entropy) p_.entropy[n_] = float(entropy);
  }

  const TokenConfidenceKernels& kernels_;
  const TokenConfidenceParams& p_;
  const int64_t n_;
  Task& task_;
  LogitsRow& row_;
  const RowSums memory_;
  const ChunkSums& sums_;
  void* const scratch_;
  ChunkMaker* const maker_;
};

}  // namespace
}  // namespace dlm::cpu
