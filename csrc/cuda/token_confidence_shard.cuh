// SPDX-License-Identifier: Apache-2.0
// Computes the summary of a row over a shard of the vocabulary (common/shard.h) from the summaries
// of its chunks. The sums over chunks are integers, of which each thread has its own until the end.
#pragma once
#include "common/shard.h"
#include "cuda/token_confidence_finish.cuh"

namespace dlm::cuda {

// What a block knows of its row. The sums are those of the argmax's chunk, with and without the
// argmax; those of x e^x are in powers of two.
struct ShardRow {
  uint32_t argmax = kNoToken, flags = 0;
  float largest = -INFINITY, second = -INFINITY;
  float weight = 0.0f, rest = 0.0f, exponent = 0.0f, rest_exponent = 0.0f;
  Drawn drawn;
  bool is_given = false;
  float given = 0.0f;
};

// Writes the words of a row whose argmax is known, or in which nothing is allowed, except for the
// sums over chunks. Called by one thread.
DLM_DEVICE void write_shard(int64_t* words, const ShardRow& row, bool with_entropy) {
  constexpr float kLn2 = 0.693147181f;
  const bool found = row.argmax != kNoToken, drawn = row.drawn.token != kNoToken;
  const float factor = with_entropy ? kLn2 : 0.0f;
  words[kShardArgmax] = found ? int64_t(row.argmax) : -1;
  words[kShardToken] = drawn ? int64_t(row.drawn.token) : -1;
  words[kShardFlags] = row.flags;
  words[kShardLargest] = two_floats(row.largest, row.second);
  words[kShardWeight] = two_floats(row.weight, row.rest);
  words[kShardExponent] =
      two_floats(mul_rn(row.exponent, factor), mul_rn(row.rest_exponent, factor));
  words[kShardDrawn] =
      two_floats(drawn ? ordered_value(row.drawn.key) : -INFINITY, row.drawn.logit);
  words[kShardGiven] = row.is_given ? two_floats(row.given, bits_to_float(1)) : 0;
}

// The sums over chunks, in shared memory: separate words for each thread.
class ShardDigits {
 public:
  static constexpr uint32_t kWords = kFinishThreads * kShardWords;

  DLM_DEVICE explicit ShardDigits(int64_t* words) : all_(words) {
    for (int64_t i = kShardWeights; i < kShardWords; ++i) own()[i] = 0;
  }
  DLM_DEVICE int64_t* own() const { return all_ + threadIdx.x * kShardWords; }

  // Called by the whole block when all threads have added their parts.
  DLM_DEVICE void write(int64_t* words) const {
    __syncthreads();
    const uint32_t word = kShardWeights + threadIdx.x;
    if (word >= kShardWords) return;
    int64_t sum = 0;
    for (uint32_t t = 0; t < kFinishThreads; ++t) sum += all_[t * kShardWords + word];
    words[word] = sum;
  }

 private:
  int64_t* const all_;
};

// 1 / T of the distribution that the statistics describe.
DLM_DEVICE double exact_scale(const TokenConfidenceParams& p, const RowPlan& plan) {
  return p.distribution == Distribution::kRaw ? 1.0 : 1.0 / double(plan.temperature);
}

template <class T>
class ShardFinish : public RowFinish<T> {
  using Base = RowFinish<T>;
  using Row = LogitsRow<T>;
  using Base::job_, Base::n_, Base::plan_, Base::sums_;

 public:
  static constexpr SmemSize smem() {
    return Base::smem().template take<int64_t>(ShardDigits::kWords);
  }
  DLM_DEVICE ShardFinish(const ConfidenceLaunch& job, SmemCarver& smem)
      : Base(job, smem), digits_(smem.take<int64_t>(ShardDigits::kWords)) {}

  DLM_DEVICE void run() {
    int64_t* const words = job_.p.partial + int64_t(n_) * kShardWords;
    ShardRow found;
    found.flags = kFlagUnused;
    if (plan_.used()) describe_shard(found);  // block-uniform
    digits_.write(words);
    if (threadIdx.x == 0) write_shard(words, found, job_.p.entropy != nullptr);
  }

 private:
  DLM_DEVICE void describe_shard(ShardRow& found) {
    const Row row(job_.p, n_, plan_.source);
    uint32_t top = 0, flags = 0, own = kNoToken, second = 0;
    this->each_chunk([&](uint32_t c) {
      top = max(top, ordered_bits(sums_.largest[c]));
      flags |= c % kWarpChunks == 0 ? sums_.flags[c / kWarpChunks] : 0;
    });
    found.flags = this->template reduce<Union>(flags);
    const float largest = ordered_value(this->template reduce<Greatest>(top));
    if (!(largest > -INFINITY)) return;  // block-uniform
    this->each_chunk([&](uint32_t c) {
      if (sums_.largest[c] == largest) own = min(own, c);
    });
    own = this->template reduce<Least>(own);

    const ShardSums sums(digits_.own(), largest, exact_scale(job_.p, plan_));
    this->each_chunk([&](uint32_t c) {
      const float z = sums_.largest[c];
      if (c == own || !(z > -INFINITY)) return;
      second = max(second, ordered_bits(z));
      sums.add(z, sums_.weight[c], exponent_of(c));
    });
    second = this->template reduce<Greatest>(second);

    const auto chunk = this->own_chunk(row, own, largest);
    found.argmax = chunk.argmax;
    found.largest = largest;
    found.second = ordered_value(max(second, ordered_bits(chunk.second)));
    found.weight = sums_.weight[own], found.rest = float(chunk.weight);
    found.exponent = sums_.exponent[own], found.rest_exponent = float(chunk.exponent);
    const uint32_t given = given_id(job_.p, n_);
    found.is_given = given != kNoToken;
    if (found.is_given) found.given = row.at(given);
    __syncthreads();  // the race overwrites sums
    if (plan_.samples) found.drawn = this->race(row);
  }
  DLM_DEVICE float exponent_of(uint32_t chunk) const {
    return job_.p.entropy ? mul_rn(sums_.exponent[chunk], 0.693147181f) : 0.0f;
  }

  const ShardDigits digits_;
};

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    finish_shard_kernel(const __grid_constant__ ConfidenceLaunch job) {
  SmemCarver smem;
  ShardFinish<T>(job, smem).run();
}

}  // namespace dlm::cuda
