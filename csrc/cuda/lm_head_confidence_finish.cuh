// SPDX-License-Identifier: Apache-2.0
// The second of two launches: computes a row's results from the summaries of its chunks
// (lm_head_confidence_scan.cuh). A block processes a row, a thread every kFinishThreads-th chunk.
#pragma once
#include "cuda/lm_head_confidence_scan.cuh"
#include "cuda/token_confidence_shard.cuh"

namespace dlm::cuda {

class HeadFinish {
 public:
  static constexpr SmemSize smem() {
    return SmemSize{}.take<uint32_t>(2 * kMaxWarps).take<double>(2 * kFinishWarps);
  }

  DLM_DEVICE HeadFinish(const HeadLaunch& job, SmemCarver& smem)
      : job_(job),
        p_(job.p.rows),
        partial_(smem.take<uint32_t>(2 * kMaxWarps)),
        of_warp_(smem.take<double>(2 * kFinishWarps)),
        n_(job.first + blockIdx.x),
        plan_(p_, n_),
        chunks_(job.chunks_of(n_)) {}

  DLM_DEVICE void run() {
    if (!plan_.used()) return write({}, {}, 0);  // block-uniform
    uint32_t top = 0, flags = 0;
    each_chunk([&](uint32_t c) {
      top = max(top, ordered_bits(chunks_.largest[c]));
      flags |= HeadChunks::flags_of(chunks_.marks[c]);
    });
    flags = reduce<Union>(flags);
    const float largest = ordered_value(reduce<Greatest>(top));
    if (!(largest > -INFINITY)) return write({}, {}, flags | kFlagNothingAllowed);
    const RowStatistics found = describe(largest);
    write(found, plan_.samples ? drawn() : Drawn{}, flags);
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

  DLM_DEVICE RowStatistics describe(float largest) {
    const uint32_t first = first_with(largest);
    const bool raw = p_.distribution == Distribution::kRaw;
    const float scale = (raw ? 1.0f : plan_.inverse) * 1.44269504f;  // to powers of two
    double weight = 0.0, exponent = 0.0;
    uint32_t second = 0;
    each_chunk([&](uint32_t c) {  // relative to the row's largest logit
      const float top = chunks_.largest[c];
      if (!(top > -INFINITY)) return;
      second = max(second, ordered_bits(c == first ? chunks_.second[c] : top));
      const float x = fmaxf((top - largest) * scale, -127.0f);
      const double factor = ptx::exp2_approx(x);
      // The chunk's own largest logit has weight 1; in one chunk it is also the row's largest.
      const double of_chunk = chunks_.weight[c] + (c == first ? 0.0 : 1.0);
      weight += factor * of_chunk;
      exponent += factor * (double(chunks_.exponent[c]) + double(x) * of_chunk);
    });
    weight = sum_over_warp(weight);
    exponent = sum_over_warp(exponent);
    if (lane_index() == 0) {
      of_warp_[2 * warp_index()] = weight;
      of_warp_[2 * warp_index() + 1] = exponent;
    }
    RowStatistics found;
    found.second = ordered_value(reduce<Greatest>(second));
    for (uint32_t w = 0; w < kFinishWarps; ++w) {
      found.weight += of_warp_[2 * w];
      found.exponent += of_warp_[2 * w + 1];
    }
    found.exponent *= 0.693147181;
    found.max = largest;
    found.argmax = argmax_of(first);
    return found;
  }

  // Ids are those of the whole vocabulary.
  DLM_DEVICE uint32_t begin_of(uint32_t chunk) const {
    return (job_.first_chunk + chunk) * kRaceChunk;
  }
  DLM_DEVICE uint32_t argmax_of(uint32_t chunk) const {
    return begin_of(chunk) + HeadChunks::argmax_of(chunks_.marks[chunk]);
  }

  // The chunk with the largest key wins; of equal keys, the first.
  DLM_DEVICE Drawn drawn() {
    uint32_t best = 0, winner = kNoToken;
    const auto key_of = [&](uint32_t c) {
      return chunks_.largest[c] > -INFINITY ? chunks_.key[c] : 0;
    };
    each_chunk([&](uint32_t c) { best = max(best, key_of(c)); });
    best = reduce<Greatest>(best);
    each_chunk([&](uint32_t c) {
      if (key_of(c) == best) winner = min(winner, c);
    });
    winner = reduce<Least>(winner);
    return {begin_of(winner) + HeadChunks::drawn_of(chunks_.marks[winner]), chunks_.drawn[winner],
            best};
  }

  DLM_DEVICE void write(const RowStatistics& found, const Drawn& drawn, uint32_t flags) const {
    if (threadIdx.x != 0) return;
    const bool is_given = found.argmax != kNoToken && given_id(p_, n_) != kNoToken;
    const float given = is_given ? given_logit() : -INFINITY;
    write_row(p_, n_, plan_, found, drawn, flags, -INFINITY, given);
  }
  // For a chunk without any logit, the scan stores none.
  DLM_DEVICE float given_logit() const {
    const uint32_t chunk = given_id(p_, n_) / kRaceChunk - job_.first_chunk;
    return chunks_.largest[chunk] > -INFINITY ? job_.given[n_ - job_.first] : -INFINITY;
  }

  // The chunk of the row's largest logit.
  DLM_DEVICE uint32_t first_with(float largest) {
    uint32_t first = kNoToken;
    each_chunk([&](uint32_t c) {
      if (chunks_.largest[c] == largest) first = min(first, c);
    });
    return reduce<Least>(first);
  }

  const HeadLaunch& job_;
  const TokenConfidenceParams& p_;
  uint32_t* const partial_;
  double* const of_warp_;
  const uint32_t n_;
  const RowPlan plan_;
  const HeadChunks chunks_;
  uint32_t turn_ = 0;
};

// The same for a shard of the vocabulary (token_confidence_shard.cuh).
class HeadShardFinish : public HeadFinish {
 public:
  static constexpr SmemSize smem() { return HeadFinish::smem().take<int64_t>(ShardDigits::kWords); }
  DLM_DEVICE HeadShardFinish(const HeadLaunch& job, SmemCarver& smem)
      : HeadFinish(job, smem), digits_(smem.take<int64_t>(ShardDigits::kWords)) {}

  DLM_DEVICE void run() {
    int64_t* const words = p_.partial + int64_t(n_) * kShardWords;
    ShardRow found;
    found.flags = kFlagUnused;
    if (plan_.used()) describe_shard(found);  // block-uniform
    digits_.write(words);
    if (threadIdx.x == 0) write_shard(words, found, p_.entropy != nullptr);
  }

 private:
  DLM_DEVICE void describe_shard(ShardRow& found) {
    uint32_t top = 0, flags = 0, second = 0;
    each_chunk([&](uint32_t c) {
      top = max(top, ordered_bits(chunks_.largest[c]));
      flags |= HeadChunks::flags_of(chunks_.marks[c]);
    });
    found.flags = reduce<Union>(flags);
    const float largest = ordered_value(reduce<Greatest>(top));
    if (!(largest > -INFINITY)) return;  // block-uniform
    const uint32_t own = first_with(largest);
    const ShardSums sums(digits_.own(), largest, exact_scale(p_, plan_));
    each_chunk([&](uint32_t c) {
      const float z = chunks_.largest[c];
      if (!(z > -INFINITY)) return;
      second = max(second, ordered_bits(c == own ? chunks_.second[c] : z));
      if (c != own) sums.add(z, weight_of(c), exponent_of(c));
    });
    found.second = ordered_value(reduce<Greatest>(second));
    found.argmax = argmax_of(own), found.largest = largest;
    found.weight = weight_of(own), found.rest = chunks_.weight[own];
    found.exponent = found.rest_exponent = chunks_.exponent[own];
    found.is_given = given_id(p_, n_) != kNoToken;
    if (found.is_given) found.given = given_logit();
    if (plan_.samples) found.drawn = drawn();
  }
  // Includes the chunk's largest logit.
  DLM_DEVICE float weight_of(uint32_t chunk) const { return add_rn(chunks_.weight[chunk], 1.0f); }
  DLM_DEVICE float exponent_of(uint32_t chunk) const {
    return p_.entropy ? mul_rn(chunks_.exponent[chunk], 0.693147181f) : 0.0f;
  }

  const ShardDigits digits_;
};

template <uint32_t threads>
__global__ void __launch_bounds__(threads, 4)
    finish_head_shard_kernel(const __grid_constant__ HeadLaunch job) {
  SmemCarver smem;
  HeadShardFinish(job, smem).run();
}

template <uint32_t threads>
__global__ void __launch_bounds__(threads, 4)
    finish_head_kernel(const __grid_constant__ HeadLaunch job) {
  SmemCarver smem;
  HeadFinish(job, smem).run();
}

}  // namespace dlm::cuda
