// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <limits>

#include "common/mass.h"
#include "common/params.h"
#include "common/race.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// Whose kernels are used where `isa` is in use.
Isa token_confidence_isa(Isa isa);

// Logits for which a thread of its own pays.
int64_t token_confidence_grain();

// Memory that the functions below work in: `sums` has token_confidence_sums(V) floats for each row,
// `scratch`, where rows are filtered, token_confidence_scratch(V) bytes, aligned to 8, for the one
// thread that calls.
int64_t token_confidence_sums(int64_t V);
int64_t token_confidence_scratch(int64_t V);

// Output rows [begin, end).
void token_confidence(const TokenConfidenceParams& p, float* sums, void* scratch, int64_t begin,
                      int64_t end);

// The same in two steps, for rows that are fewer than threads: the parts [begin, end) of all rows
// (part i is of row i / token_confidence_parts(p)), then the rows.
constexpr int64_t kPart = 16384;  // logits
inline int64_t token_confidence_parts(int64_t V) { return (V + kPart - 1) / kPart; }
// Of a shard of a vocabulary those parts that it has a share of.
inline int64_t token_confidence_parts(const TokenConfidenceParams& p) {
  return token_confidence_parts(p.V) - p.first / kPart;
}
void token_confidence_scan(const TokenConfidenceParams& p, float* sums, int64_t begin, int64_t end);
void token_confidence_finish(const TokenConfidenceParams& p, float* sums, void* scratch,
                             int64_t begin, int64_t end);

// --- what the kernels of an instruction set do, and what they are told -------------------------

// One output row: its effective logits are guided, biased, without NaN and +inf, and -inf where
// banned or below the floor.
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
// A token, and its effective logit.
struct Drawn {
  int64_t token;
  float logit;
};

// A row is described by chunks of kRaceChunk logits, each by itself, so that a row's bits depend
// neither on how many threads share it nor on anything around it. Of chunk c, in arrays over the
// chunks of a row:
struct ChunkSums {
  float* largest;   // its largest logit
  float* weight;    // sum of e^x, x = (z - largest) * scale
  float* exponent;  // sum of x e^x
  float* tempered;  // sum of e^((z - largest) / T)
};
struct Wanted {
  bool exponent, tempered;  // whether those sums are wanted
  float scale, inverse_temperature;
};
struct Sums {
  float weight, exponent;
};

// The statistics of a row. The sums leave out the argmax, whose term is 1.
struct Summary {
  float max = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
  int64_t argmax = -1;
  double weight = 0.0, exponent = 0.0;
};

constexpr int64_t kFewLogits = 256;
constexpr int kRowsTogether = 16;
// Rows of few logits are handled together, each in a lane: for one alone the vectors would be too
// long, and the last steps, once a row, would take longer than the logits.
struct FewRows {
  int count = 0;  // of the elements of each array
  const LogitsRow* row[kRowsTogether];
  float scale[kRowsTogether];    // of what the statistics are about, 1 / T
  int64_t given[kRowsTogether];  // -1: none
  bool entropy;
  // Results: the statistics of the argmax.
  int64_t argmax[kRowsTogether];  // -1: there is nothing to choose
  int32_t flags[kRowsTogether];
  float max[kRowsTogether], weight[kRowsTogether];  // weight: of all but the argmax
  float confidence[kRowsTogether], margin[kRowsTogether], of_entropy[kRowsTogether],
      logsumexp[kRowsTogether], p_given[kRowsTogether];
};

// What output row n reads, if that is row `source` of the logits; all of it is kept.
LogitsRow logits_row(const TokenConfidenceParams& p, int64_t n, int64_t source);

struct TokenConfidenceKernels {
  // Sums of chunks [begin, end) of a row; returns flags.
  int32_t (*sum_chunks)(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want,
                        const ChunkSums& sums);
  // The effective logits of a chunk, -inf beyond the row; returns the largest.
  float (*load_chunk)(const LogitsRow& row, int64_t chunk, float* z);
  // Sums of a chunk's logits, whose largest is `largest`, or was before it was made -inf.
  Sums (*sum_chunk)(const float* z, float largest, float scale);
  // From the sums of a row's chunks, at `scale`.
  Summary (*summarize)(const LogitsRow& row, const ChunkSums& sums, bool exponent, float scale);
  // Writes those of a chunk's logits that are in [low, high] to `to`, which has room for two
  // chunks, adds the number of those above to `above`; returns how many were written.
  int64_t (*collect)(const float* z, float low, float high, float* to, uint64_t* above);
  // The sum of mass_of(e^((z - max) * scale)) over a chunk's logits above `above`.
  uint64_t (*mass_above)(const float* z, float max, float scale, float above);
  // The same of each of n logits.
  void (*masses)(const float* z, int64_t n, float max, float scale, uint64_t* mass);
  // chunk_key (common/race.h) of n chunks.
  void (*chunk_keys)(const float* largest, const float* weight, int64_t n, const Draw& draw,
                     float* key);
  // The token that wins a chunk, which has one to draw.
  Drawn (*race_tokens)(const LogitsRow& row, int64_t chunk, const Draw& draw);
  // null: rows of few logits are handled as others.
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
