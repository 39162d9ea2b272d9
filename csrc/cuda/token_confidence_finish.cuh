// SPDX-License-Identifier: Apache-2.0
// Computes a row's results from the summaries of its chunks (token_confidence_scan.cuh): its
// statistics, and the token that wins the race (common/race.h). A block processes a row, a thread
// every kFinishThreads-th chunk. Single chunks that are read again are processed by each warp
// separately, so that all of them know the result. A chunk's exact weight, whose bits decide the
// race, is computed only for chunks that may win: the scan's sums bound it.
#pragma once
#include "common/order.h"
#include "cuda/token_confidence_filter.cuh"
#include "cuda/token_confidence_race.cuh"
#include "cuda/token_confidence_results.cuh"

namespace dlm::cuda {

constexpr uint32_t kFinishThreads = 128, kFinishWarps = kFinishThreads / 32;

template <class T>
class RowFinish {
  using Row = LogitsRow<T>;

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}.take<uint32_t>(2 * kMaxWarps).template take<double>(2 * kFinishWarps);
  }

  DLM_DEVICE RowFinish(const ConfidenceLaunch& job, SmemCarver& smem)
      : job_(job),
        partial_(smem.take<uint32_t>(2 * kMaxWarps)),
        of_warp_(smem.take<double>(2 * kFinishWarps)),
        n_(job.first + blockIdx.x),
        plan_(job.p, n_),
        sums_(job.sums_of(n_)),
        scale_(job.p.distribution == Distribution::kRaw ? 1.0f : plan_.inverse) {}

  DLM_DEVICE void run() {
    if (!plan_.used()) {  // block-uniform
      if (threadIdx.x == 0) write({}, {}, 0);
      return;
    }
    const Row row(job_.p, n_, plan_.source);
    floor_ = plan_.filters ? job_.floor(n_) : -INFINITY;
    uint32_t top = 0, flags = 0;
    each_chunk([&](uint32_t c) {
      top = max(top, ordered_bits(sums_.largest[c]));
      flags |= c % kWarpChunks == 0 ? sums_.flags[c / kWarpChunks] : 0;
    });
    flags = reduce<Union>(flags);
    const float largest = ordered_value(reduce<Greatest>(top));
    if (!(largest > -INFINITY)) {
      if (threadIdx.x == 0) write({}, {}, flags | kFlagNothingAllowed);
      return;
    }
    const RowStatistics found = describe(row, largest);
    const Drawn drawn = plan_.samples ? race(row) : Drawn{};
    if (threadIdx.x == 0) write(found, drawn, flags);
  }

  // For a row that is used and not filtered.
  DLM_DEVICE float logsumexp() {
    uint32_t top = 0;
    each_chunk([&](uint32_t c) { top = max(top, ordered_bits(sums_.largest[c])); });
    const float largest = ordered_value(reduce<Greatest>(top));
    if (!(largest > -INFINITY)) return -INFINITY;
    const RowStatistics found = describe(Row(job_.p, n_, plan_.source), largest);
    return float(found.max * double(scale_) + log1p(found.weight));
  }

 protected:
  template <class Visit>
  DLM_DEVICE void each_chunk(Visit visit) const {
    for (uint32_t c = threadIdx.x; c < job_.chunks; c += kFinishThreads) visit(c);
  }
  // Reduces over the block. Two arrays are used alternately, so that one barrier per reduction is
  // enough.
  template <class Op>
  DLM_DEVICE uint32_t reduce(uint32_t value) {
    turn_ ^= kMaxWarps;
    return block_reduce<Op>(value, partial_ + turn_);
  }

  // Loads a lane's logits of a chunk, leaving out those below `floor`.
  DLM_DEVICE void load(const Row& row, uint32_t chunk, float floor, float (&z)[8]) const {
    uint32_t flags = 0;
    row.effective(job_.first_chunk + chunk, z, flags);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) z[j] = z[j] >= floor ? z[j] : -INFINITY;
  }

  DLM_DEVICE RowStatistics describe(const Row& row, float largest) {
    RowStatistics found;
    found.max = largest;
    uint32_t first = kNoToken;
    each_chunk([&](uint32_t c) {
      if (sums_.largest[c] == largest) first = min(first, c);
    });
    first = reduce<Least>(first);

    const float scale = scale_ * 1.44269504f;  // to powers of two
    double weight = 0.0, exponent = 0.0;
    uint32_t second = 0;
    each_chunk([&](uint32_t c) {  // relative to the row's largest logit
      const float top = sums_.largest[c];
      if (c == first || !(top > -INFINITY)) return;
      second = max(second, ordered_bits(top));
      const float x = fmaxf((top - largest) * scale, -127.0f), of_chunk = sums_.weight[c];
      const double factor = ptx::exp2_approx(x);
      weight += factor * of_chunk;
      exponent += factor * (double(sums_.exponent[c]) + double(x) * of_chunk);
    });
    weight = sum_over_warp(weight);
    exponent = sum_over_warp(exponent);
    if (lane_index() == 0) {
      of_warp_[2 * warp_index()] = weight;
      of_warp_[2 * warp_index() + 1] = exponent;
    }
    second = reduce<Greatest>(second);
    for (uint32_t w = 0; w < kFinishWarps; ++w) {
      found.weight += of_warp_[2 * w];
      found.exponent += of_warp_[2 * w + 1];
    }

    const OwnChunk own = own_chunk(row, first, largest);
    found.argmax = own.argmax;
    found.second = ordered_value(max(second, ordered_bits(own.second)));
    found.weight += own.weight;
    found.exponent = 0.693147181 * (found.exponent + own.exponent);
    return found;
  }

  // The chunk of the argmax, without the argmax.
  struct OwnChunk {
    uint32_t argmax;
    float second;
    double weight, exponent;
  };
  DLM_DEVICE OwnChunk own_chunk(const Row& row, uint32_t chunk, float largest) const {
    const float scale = scale_ * 1.44269504f;  // to powers of two
    float z[8];
    load(row, chunk, plan_.about_kept ? floor_ : -INFINITY, z);
    OwnChunk own;
    own.argmax = kNoToken;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (z[j] == largest) own.argmax = min(own.argmax, id_of(chunk, j));
    }
    own.argmax = __reduce_min_sync(kAllLanes, own.argmax);
    float weight = 0.0f, exponent = 0.0f, next = -INFINITY;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (id_of(chunk, j) == own.argmax) continue;
      next = fmaxf(next, z[j]);
      const float x = fmaxf((z[j] - largest) * scale, -127.0f), w = ptx::exp2_approx(x);
      weight += w;
      exponent = __fmaf_rn(x, w, exponent);
    }
    own.second = ordered_value(__reduce_max_sync(kAllLanes, ordered_bits(next)));
    own.weight = sum_over_warp(weight);
    own.exponent = sum_over_warp(exponent);
    return own;
  }
  // The id within the whole vocabulary.
  DLM_DEVICE uint32_t id_of(uint32_t chunk, uint32_t j) const {
    return Row::id_of(job_.first_chunk + chunk, j);
  }

  // A chunk's weight at the row's own temperature is bounded by its weight at a higher temperature,
  // or by the number of its logits; and by the weight of all its logits if a filter drops some.
  // Exact keys are computed starting with the chunk whose bound gives the highest key, until one
  // exceeds all other bounds.
  DLM_DEVICE Drawn race(const Row& row) {
    constexpr float kRounding = 1.0001f;  // covers the rounding of all sums and logarithms
    const RowRandom random(job_.p, n_);
    const bool colder = plan_.inverse >= scale_;
    uint32_t* const bound = reinterpret_cast<uint32_t*>(sums_.weight);  // no longer needed
    each_chunk([&](uint32_t c) {
      const float top = sums_.largest[c];
      const bool races = top > -INFINITY && top >= floor_;
      const float most = colder ? sums_.weight[c] * kRounding : kRaceChunk * kRounding;
      const uint32_t r = random.word(Stream::kChunk, job_.first_chunk + c);
      bound[c] = races ? ordered_bits(chunk_key(top, plan_.inverse, most, r)) : 0;
    });
    uint32_t best = 0, winner = kNoToken;
    for (;;) {
      uint32_t highest = 0, at = kNoToken;
      each_chunk([&](uint32_t c) { highest = max(highest, bound[c]); });
      highest = reduce<Greatest>(highest);
      if (highest == 0 || highest < best) break;
      each_chunk([&](uint32_t c) {
        if (bound[c] == highest) at = min(at, c);
      });
      at = reduce<Least>(at);
      if (at % kFinishThreads == threadIdx.x) bound[at] = 0;
      const uint32_t key = exact_key(row, at, random);
      if (key > best || (key == best && at < winner)) {
        best = key;
        winner = at;
      }
    }
    if (winner == kNoToken) return {};
    Drawn drawn = race_tokens_of(row, winner, random);
    drawn.key = best;
    return drawn;
  }

  // Returns ordered bits.
  DLM_DEVICE uint32_t exact_key(const Row& row, uint32_t chunk, const RowRandom& random) const {
    float z[8];
    load(row, chunk, floor_, z);
    return exact_chunk_key<Row::kTwoRuns>(z, sums_.largest[chunk], plan_.inverse,
                                          random.word(Stream::kChunk, job_.first_chunk + chunk));
  }

  DLM_DEVICE Drawn race_tokens_of(const Row& row, uint32_t chunk, const RowRandom& random) const {
    float z[8];
    load(row, chunk, floor_, z);
    return race_tokens<Row>(z, job_.first_chunk + chunk, plan_.inverse, random);
  }

  // Called by one thread.
  DLM_DEVICE void write(const RowStatistics& found, const Drawn& drawn, uint32_t flags) const {
    const uint32_t id = plan_.used() ? given_id(job_.p, n_) : kNoToken;
    const float given = id == kNoToken ? -INFINITY : Row(job_.p, n_, plan_.source).at(id);
    write_row(job_.p, n_, plan_, found, drawn, flags, floor_, given);
  }

  const ConfidenceLaunch& job_;
  uint32_t* const partial_;
  double* const of_warp_;
  const uint32_t n_;
  const RowPlan plan_;
  const ChunkArrays sums_;
  const float scale_;
  float floor_ = -INFINITY;
  uint32_t turn_ = 0;
};

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    finish_rows_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  RowFinish<T>(job, smem).run();
}

}  // namespace dlm::cuda
