// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <limits>

#include "common/params.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// What a scan of a row, or of a part of one, finds. The sums leave out the argmax, whose term is 1.
struct Scan {
  float max = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
  int64_t argmax = -1;
  double weight = 0.0, weighted_exponent = 0.0;
  // the chunk with the largest key (common/race.h), -1: none
  float key = -std::numeric_limits<float>::infinity();
  int64_t chunk = -1;
  int32_t flags = 0;
};

// A row is scanned in parts of kPart logits, each by itself, merged in their order: by the shape
// alone, so that the bits do not depend on how many threads share the work.
constexpr int64_t kPart = 16384;
inline int64_t token_confidence_parts(int64_t V) { return (V + kPart - 1) / kPart; }

// Whose kernels are used where `isa` is in use.
Isa token_confidence_isa(Isa isa);

// Logits for which a thread of its own pays.
int64_t token_confidence_grain();

// Output rows [begin, end).
void token_confidence(const TokenConfidenceParams& p, int64_t begin, int64_t end);

// The same in two steps, for rows that are fewer than threads: the parts [begin, end) of all rows
// (part i is of row i / token_confidence_parts(V)), then the rows.
void token_confidence_scan(const TokenConfidenceParams& p, Scan* parts, int64_t begin, int64_t end);
void token_confidence_finish(const TokenConfidenceParams& p, const Scan* parts, int64_t begin,
                             int64_t end);

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

struct Wanted {
  bool second, sums, entropy, sample;
  float scale;  // 1/T of the distribution that the sums describe
  Draw draw;    // read where a sample is wanted
};

// Top-k counts logits, top-p adds their weights e^((z - max) * scale), each an integer number of
// 2^-kMassBits, so that a sum has the same bits in any order. (A vocabulary has less than 2^21
// words: the sum fits.)
constexpr int kMassBits = 42;
constexpr float kMassUnits = 4398046511104.0f;
struct Measure {
  bool mass;
  float max, scale;
};
// The measure of logits whose ordered bits are in [lowest, highest] goes to bin
// (ordered bits - base) >> shift.
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
struct Bins {
  uint32_t base, lowest, highest;
  int shift;
  uint64_t* sum;    // [kBins]
  uint64_t* total;  // null, or where to add the measure of all logits
};

// Logits [begin, end) of a row; begin is a multiple of 1024.
// Rows of few logits are handled together, each in a lane: for one alone the vectors would be too
// long, and the last steps, once a row, would take longer than the logits.
constexpr int64_t kFewLogits = 256;
constexpr int kRowsTogether = 16;
struct FewRows {
  int count = 0;  // of the elements of each array
  const LogitsRow* row[kRowsTogether];
  float scale[kRowsTogether];    // of what the statistics are about, 1 / T
  int64_t given[kRowsTogether];  // -1: none
  bool entropy;
  // Results: the statistics of the argmax.
  int64_t argmax[kRowsTogether];  // -1: there is nothing to choose
  int32_t flags[kRowsTogether];
  float max[kRowsTogether], weight[kRowsTogether];  // as Scan has them
  float confidence[kRowsTogether], margin[kRowsTogether], of_entropy[kRowsTogether],
      logsumexp[kRowsTogether], p_given[kRowsTogether];
};

using ScanKernel = Scan (*)(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want);
using MeasureKernel = void (*)(const LogitsRow& row, int64_t begin, int64_t end,
                               const Measure& measure, const Bins& bins);
// The token that wins a chunk, which has one to draw.
using RaceKernel = Drawn (*)(const LogitsRow& row, int64_t chunk, const Draw& draw);

using FewKernel = void (*)(FewRows& rows);  // null: one by one

namespace generic {
Drawn race_tokens(const LogitsRow& row, int64_t chunk, const Draw& draw);
Scan scan(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want);
void add_measures(const LogitsRow& row, int64_t begin, int64_t end, const Measure& measure,
                  const Bins& bins);
}  // namespace generic

namespace avx2 {
void measure_rows(FewRows& rows);
Drawn race_tokens(const LogitsRow& row, int64_t chunk, const Draw& draw);
Scan scan(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want);
void add_measures(const LogitsRow& row, int64_t begin, int64_t end, const Measure& measure,
                  const Bins& bins);
}  // namespace avx2

namespace avx512 {
Scan scan(const LogitsRow& row, int64_t begin, int64_t end, const Wanted& want);
void add_measures(const LogitsRow& row, int64_t begin, int64_t end, const Measure& measure,
                  const Bins& bins);
}  // namespace avx512

}  // namespace dlm::cpu
