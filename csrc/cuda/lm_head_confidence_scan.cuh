// SPDX-License-Identifier: Apache-2.0
// The first of two launches: a block computes the logits of up to kRows rows and one chunk of the
// vocabulary, rounded to the hidden states' type as a linear layer rounds them, and summarizes each
// row's chunk as lm_head_confidence_finish.cuh needs it; the logits are not needed again. If rows
// are filtered, it stores the logits instead, and token_confidence processes them. With guidance,
// the second half of the block's rows are the unconditional rows of the first half. Blocks of the
// same chunk run at the same time, so that all but one find its weights in the L2 cache. Bytes: the
// weights once, the rows' hidden states once per chunk. Flops: 2 D per row and token.
#pragma once
#include "cuda/lm_head_confidence_product.cuh"
#include "cuda/token_confidence_race.cuh"

namespace dlm::cuda {

// Summary of a row's chunk. The sums are relative to its largest logit and exclude it, unlike those
// of token_confidence_scan.cuh.
struct HeadChunks {
  float *largest, *weight, *exponent, *second;
  uint32_t* marks;  // see mark()
  uint32_t* key;    // in the race, in ordered bits; 0: does not take part
  float* drawn;     // logit of the token that wins the chunk
  static constexpr int64_t kArrays = 7;

  // Packs the indices of the largest logit and of the drawn token within the chunk, and the row's
  // flags.
  static DLM_DEVICE uint32_t mark(uint32_t argmax, uint32_t drawn, uint32_t flags) {
    return argmax % kRaceChunk | drawn % kRaceChunk << 8 | flags << 16;
  }
  static DLM_DEVICE uint32_t argmax_of(uint32_t mark) { return mark & 0xff; }
  static DLM_DEVICE uint32_t drawn_of(uint32_t mark) { return mark >> 8 & 0xff; }
  static DLM_DEVICE uint32_t flags_of(uint32_t mark) { return mark >> 16; }
};
static_assert(kRaceChunk == 256);

// Rows [first, end) of the output.
struct HeadLaunch {
  LmHeadConfidenceParams p;
  uint32_t first, end;
  uint32_t chunks, tiles;        // of the vocabulary or a shard of it; of these rows
  uint32_t first_chunk;          // index of the first chunk within the whole vocabulary
  bool aligned;                  // all rows start at, and have a length of, multiples of 16 bytes
  float* sums;                   // [end - first, kArrays, chunks]
  float* given;                  // [end - first] logits of given_id
  void *logits, *uncond_logits;  // [end - first, logits_stride] if they are stored; else null
  int64_t logits_stride;         // a multiple of 16 bytes
  int32_t* row_map;              // [end - first] of the stored logits: which rows are used

  DLM_DEVICE HeadChunks chunks_of(uint32_t n) const {
    float* own = sums + int64_t(n - first) * HeadChunks::kArrays * chunks;
    const auto words = [&](uint32_t i) { return reinterpret_cast<uint32_t*>(own + i * chunks); };
    return {own,      own + chunks, own + 2 * chunks, own + 3 * chunks,
            words(4), words(5),     own + 6 * chunks};
  }
};

template <class T, int kRows>
class HeadScan {
  using Row = LogitsRow<T>;
  using Slices = HeadSlices<T, kRows>;
  static constexpr uint32_t kLogitsBytes = kRows * kLogitsPitch<T>;
  // The logits overwrite the operands of their product.
  static constexpr uint32_t kArena = Slices::kBytes > kLogitsBytes ? Slices::kBytes : kLogitsBytes;

 public:
  static constexpr SmemSize smem() {
    return SmemSize{}
        .take<unsigned char>(kArena)
        .template take<const T*>(kRows)
        .template take<Place>(1);
  }

  DLM_DEVICE HeadScan(const HeadLaunch& job, SmemCarver& smem)
      : job_(job),
        p_(job.p.rows),
        arena_(smem.take<unsigned char>(kArena)),
        hidden_(smem.take<const T*>(kRows)),
        place_(smem.take<Place>(1)),
        uncond_(job.p.uncond_hidden ? kRows / 2 : 0) {}

  DLM_DEVICE void run() {
    find_place();
    find_hidden();
    __syncthreads();
    {
      const uint32_t begin = chunk() * kRaceChunk;
      const Slices slices(ptx::smem_address(arena_), hidden_,
                          static_cast<const T*>(job_.p.weight) + begin * job_.p.weight_stride,
                          job_.p.weight_stride, uint32_t(p_.V) - begin, uint32_t(job_.p.D),
                          job_.aligned);
      HeadProduct<T, kRows> product;
      slices.multiply(product);
      product.leave(arena_);
    }
    __syncthreads();
    at_ = *place_;
#pragma unroll 1
    for (uint32_t r = warp_index(); r < at_.rows; r += kHeadWarps) {
      const RowPlan plan(p_, at_.first + r);
      if (job_.logits) {
        keep(r, plan);
      } else if (plan.used()) {
        describe(r, plan);
      }
    }
  }

 private:
  // The chunk of the shard, and the rows. Kept in shared memory while the product needs all
  // registers.
  struct Place {
    uint32_t own, first, rows;
  };
  DLM_DEVICE void find_place() {
    const uint32_t rows = uncond_ ? uncond_ : kRows;
    at_.own = blockIdx.x / job_.tiles;
    at_.first = job_.first + blockIdx.x % job_.tiles * rows;
    at_.rows = min(job_.end - at_.first, rows);
    if (threadIdx.x == 0) *place_ = at_;
  }
  // The chunk's index within the whole vocabulary.
  DLM_DEVICE uint32_t chunk() const { return job_.first_chunk + at_.own; }

  DLM_DEVICE void find_hidden() const {
    for (uint32_t i = threadIdx.x; i < kRows; i += kHeadThreads) {
      const bool is_uncond = uncond_ && i >= uncond_;
      const uint32_t r = is_uncond ? i - uncond_ : i;
      const int64_t source = r < at_.rows ? RowPlan(p_, at_.first + r).source : -1;
      const void* rows = is_uncond ? job_.p.uncond_hidden : job_.p.hidden;
      const int64_t stride = is_uncond ? job_.p.uncond_stride : job_.p.hidden_stride;
      hidden_[i] = source < 0 ? nullptr : static_cast<const T*>(rows) + source * stride;
    }
  }

  // Loads a lane's logits of a row of the block.
  DLM_DEVICE void load(uint32_t r, uint4 (&raw)[Row::kRuns]) const {
    const uint32_t at = ptx::smem_address(arena_) + r * kLogitsPitch<T> + lane_index() * 16;
#pragma unroll
    for (uint32_t i = 0; i < Row::kRuns; ++i) raw[i] = ptx::ld_shared_16(at + i * 512);
  }

  DLM_DEVICE void keep(uint32_t r, const RowPlan& plan) const {
    const uint32_t own = at_.first - job_.first + r;
    if (chunk() == 0 && lane_index() == 0) job_.row_map[own] = plan.used() ? int32_t(own) : -1;
    if (!plan.used()) return;
    const auto write = [&](uint32_t row, void* logits) {
      uint4 raw[Row::kRuns];
      load(row, raw);
#pragma unroll
      for (uint32_t i = 0; i < Row::kRuns; ++i) {
        const uint32_t id = Row::id_of(chunk(), i * kPerChunk<T>);
        if (id < p_.V)
          ptx::st_global_16(static_cast<T*>(logits) + own * job_.logits_stride + id, raw[i]);
      }
    };
    write(r, job_.logits);
    if (uncond_) write(uncond_ + r, job_.uncond_logits);
  }

  DLM_DEVICE void describe(uint32_t r, const RowPlan& plan) const {
    const uint32_t n = at_.first + r;
    const HeadChunks chunks = job_.chunks_of(n);
    float z[8];
    uint32_t flags = effective(r, plan, z);
    const float largest = ordered_value(over_warp(largest_of(z, kNoToken)));
    if (lane_index() == 0) chunks.largest[at_.own] = largest;
    if (!(largest > -INFINITY)) {  // warp-uniform
      if (lane_index() == 0) chunks.marks[at_.own] = HeadChunks::mark(0, 0, flags);
      return;
    }
    uint32_t argmax = kNoToken;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (z[j] == largest) argmax = min(argmax, Row::id_of(chunk(), j));
    }
    argmax = __reduce_min_sync(kAllLanes, argmax);
    const float second = ordered_value(over_warp(largest_of(z, argmax)));
    float weight, exponent;
    add_up(z, argmax, largest, plan, weight, exponent);
    uint32_t key = 0;
    Drawn drawn;
    if (plan.samples) {
      const RowRandom random(p_, n);
      const uint32_t r = random.word(Stream::kChunk, chunk());
      key = exact_chunk_key<Row::kTwoRuns>(z, largest, plan.inverse, r);
      drawn = race_tokens<Row>(z, chunk(), plan.inverse, random);
    }
    leave_given(n, z);
    if (lane_index() != 0) return;
    chunks.weight[at_.own] = weight;
    chunks.exponent[at_.own] = exponent;
    chunks.second[at_.own] = second;
    chunks.marks[at_.own] = HeadChunks::mark(argmax, drawn.token, flags);
    chunks.key[at_.own] = key;
    chunks.drawn[at_.own] = drawn.logit;
  }

  // Computes a lane's effective logits as in token_confidence; returns the warp's flags.
  DLM_DEVICE uint32_t effective(uint32_t r, const RowPlan& plan, float (&z)[8]) const {
    const Row row(p_, at_.first + r, plan.source);
    uint4 raw[Row::kRuns], other[Row::kRuns] = {};
    load(r, raw);
    if (uncond_) load(uncond_ + r, other);
    uint32_t flags = 0;
    row.effective_of(chunk(), raw, uncond_ != 0, other, z, flags);
    return __reduce_or_sync(kAllLanes, flags);
  }

  // Returns the largest of a lane's logits except for one token's, as ordered bits.
  DLM_DEVICE uint32_t largest_of(const float (&z)[8], uint32_t but) const {
    float top = -INFINITY;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) top = Row::id_of(chunk(), j) == but ? top : fmaxf(top, z[j]);
    return ordered_bits(top);
  }
  static DLM_DEVICE uint32_t over_warp(uint32_t ordered) {
    return __reduce_max_sync(kAllLanes, ordered);
  }

  DLM_DEVICE void add_up(const float (&z)[8], uint32_t argmax, float largest, const RowPlan& plan,
                         float& weight, float& exponent) const {
    const bool raw = p_.distribution == Distribution::kRaw;
    const float scale = (raw ? 1.0f : plan.inverse) * 1.44269504f;
    weight = exponent = 0.0f;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const float x = fmaxf((z[j] - largest) * scale, -127.0f);  // 2^-127 counts as zero
      const float w = Row::id_of(chunk(), j) == argmax ? 0.0f : ptx::exp2_approx(x);
      weight += w;
      exponent = __fmaf_rn(x, w, exponent);
    }
#pragma unroll
    for (uint32_t bit = 16; bit; bit /= 2) {
      weight = add_across(weight, bit);
      exponent = add_across(exponent, bit);
    }
  }

  DLM_DEVICE void leave_given(uint32_t n, const float (&z)[8]) const {
    const uint32_t given = given_id(p_, n);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (Row::id_of(chunk(), j) == given) job_.given[n - job_.first] = z[j];
    }
  }

  const HeadLaunch& job_;
  const TokenConfidenceParams& p_;
  unsigned char* const arena_;
  const T** const hidden_;
  Place* const place_;
  const uint32_t uncond_;  // first unconditional row of the block; 0: there are none
  Place at_;
};

// Two blocks share a multiprocessor if their sums leave room.
template <class T, int kRows>
__global__ void __launch_bounds__(kHeadThreads, kRows > 64 ? 1 : 2)
    scan_head_kernel(const __grid_constant__ HeadLaunch job) {
  SmemCarver smem;
  HeadScan<T, kRows>(job, smem).run();
}

}  // namespace dlm::cuda
