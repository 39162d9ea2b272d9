// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <limits>

#include "common/mass.h"
#include "common/params.h"
#include "common/race.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// The instruction set whose kernels are used when `isa` is in use.
Isa token_confidence_isa(Isa isa);

// Number of logits that justifies a thread.
int64_t token_confidence_grain();

// Working memory of the functions below: `sums` has token_confidence_sums(V) floats for each row;
// `scratch`, needed if rows are filtered, has token_confidence_scratch(V) bytes, aligned to 8, for
// the calling thread.
int64_t token_confidence_sums(int64_t V);
int64_t token_confidence_scratch(int64_t V);

// Processes output rows [begin, end).
void token_confidence(const TokenConfidenceParams& p, float* sums, void* scratch, int64_t begin,
                      int64_t end);

// The same in two steps, for fewer rows than threads: first parts [begin, end) of all rows (part i
// belongs to row i / token_confidence_parts(p)), then the rows.
constexpr int64_t kPart = 16384;  // logits
inline int64_t token_confidence_parts(int64_t V) { return (V + kPart - 1) / kPart; }
// Number of parts per row; for a shard of a vocabulary, only the parts that it overlaps.
inline int64_t token_confidence_parts(const TokenConfidenceParams& p) {
  return token_confidence_parts(p.V) - p.first / kPart;
}
void token_confidence_scan(const TokenConfidenceParams& p, float* sums, int64_t begin, int64_t end);
void token_confidence_finish(const TokenConfidenceParams& p, float* sums, void* scratch,
                             int64_t begin, int64_t end);

// --- the kernels of an instruction set, and their arguments --------------------------------------

// One output row: its effective logits include guidance and bias, have no NaN and +inf, and are
// -inf where banned or below the floor.
struct LogitsRow {
  DType dtype;
  int64_t V;
  const void *logits, *uncond;  // the row's first element; uncond is null without guidance
  float guidance;               // cfg_scale + 1
  const float* bias;
  const int64_t* banned;
  int64_t banned_count;
  const int32_t* bitmask;
  float floor;
};

// What a row is drawn with: words of the Philox streams kChunk and kToken, see common/race.h.
struct Draw {
  uint64_t seed;
  uint32_t position, step, redraw;
  float inverse_temperature;
};
// A token and its effective logit.
struct Drawn {
  int64_t token;
  float logit;
};

// Chunks of kRaceChunk logits are summarized independently, so that a row's bits depend neither on
// how many threads share it nor on anything around it. Arrays over the chunks of a row hold, for
// chunk c:
struct ChunkSums {
  float* largest;   // its largest logit
  float* weight;    // sum of e^x, x = (z - largest) * scale
  float* exponent;  // sum of x e^x
  float* tempered;  // sum of e^((z - largest) / T)
};
struct Wanted {
  bool exponent, tempered;  // whether to compute these sums
  float scale, inverse_temperature;
};
struct Sums {
  float weight, exponent;
};

// The statistics of a row. The sums exclude the argmax, whose term is 1.
struct Summary {
  float max = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
  int64_t argmax = -1;
  double weight = 0.0, exponent = 0.0;
};

constexpr int64_t kFewLogits = 256;
constexpr int kRowsTogether = 16;
// Rows of few logits are processed together, one per lane: for a single row the vectors would be
// too long, and the final steps would take longer than the logits.
struct FewRows {
  int count = 0;  // number of used elements in each array
  const LogitsRow* row[kRowsTogether];
  float scale[kRowsTogether];    // 1 / T of the distribution that the statistics describe
  int64_t given[kRowsTogether];  // -1: none
  bool entropy;
  // Results: the statistics of the argmax.
  int64_t argmax[kRowsTogether];  // -1: no token is allowed
  int32_t flags[kRowsTogether];
  float max[kRowsTogether], weight[kRowsTogether];  // weight: excludes the argmax
  float confidence[kRowsTogether], margin[kRowsTogether], of_entropy[kRowsTogether],
      logsumexp[kRowsTogether], p_given[kRowsTogether];
};

// The logits of output row n, which are row `source` of the logits; all of it is kept.
LogitsRow logits_row(const TokenConfidenceParams& p, int64_t n, int64_t source);

struct TokenConfidenceKernels {
  // Computes the sums of chunks [begin, end) of a row; returns flags.
  int32_t (*sum_chunks)(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want,
                        const ChunkSums& sums);
  // Writes the effective logits of a chunk, -inf beyond the row; returns the largest.
  float (*load_chunk)(const LogitsRow& row, int64_t chunk, float* z);
  // Sums over a chunk's logits. `largest` is the largest of them, possibly before it was set to
  // -inf.
  Sums (*sum_chunk)(const float* z, float largest, float scale);
  // Computes the statistics from the sums of a row's chunks, at `scale`.
  Summary (*summarize)(const LogitsRow& row, const ChunkSums& sums, bool exponent, float scale);
  // Writes those of a chunk's logits that are in [low, high] to `to`, which has room for two
  // chunks, and adds the number of those above to `above`; returns how many were written.
  int64_t (*collect)(const float* z, float low, float high, float* to, uint64_t* above);
  // Sums mass_of(e^((z - max) * scale)) over those of a chunk's logits that are above `above`.
  uint64_t (*mass_above)(const float* z, float max, float scale, float above);
  // Computes the same mass for each of n logits.
  void (*masses)(const float* z, int64_t n, float max, float scale, uint64_t* mass);
  // Computes chunk_key (common/race.h) for n chunks.
  void (*chunk_keys)(const float* largest, const float* weight, int64_t n, const Draw& draw,
                     float* key);
  // Returns the token that wins a chunk, which must contain one that can be drawn.
  Drawn (*race_tokens)(const LogitsRow& row, int64_t chunk, const Draw& draw);
  // If null, rows of few logits are processed like any others.
  void (*measure_rows)(FewRows& rows);
};

TokenConfidenceKernels token_confidence_kernels();  // of the instruction set in use

namespace generic {
TokenConfidenceKernels token_confidence();
}
namespace avx2 {
TokenConfidenceKernels token_confidence();
}
namespace avx512 {
TokenConfidenceKernels token_confidence();
}

}  // namespace dlm::cpu
