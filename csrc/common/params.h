// SPDX-License-Identifier: Apache-2.0
// One plain struct per op with everything a kernel needs. csrc/torch/<op>.cpp fills and checks it;
// every back end reads it. Pointers to optional inputs are null when absent. Strides count
// elements. The letters of the dimensions are listed in csrc/README.md.
//
// Masks are bytes: torch treats every nonzero byte of a bool tensor as true (a uint8 tensor viewed
// as bool can hold values other than 1), while a C++ bool that is neither 0 nor 1 is undefined
// behavior.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dlm {

// A parameter with one value for each group of consecutive rows: given once (rows_per_value = all
// rows), once per request, or once per row.
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t rows_per_value = 1;
  DLM_HD T at(int64_t row, T absent) const { return data ? data[row / rows_per_value] : absent; }
  explicit operator bool() const { return data != nullptr; }
};

// Randomness of a row: see philox.h.
struct RandomKey {
  PerRow<int64_t> seed;               // null: no random numbers requested
  PerRow<int32_t> step;               // null: 0
  const int32_t* position = nullptr;  // one per slot: its position in the request
  PerRow<int32_t> redraw;             // null: 0; rejected draws of the position in this step
};

struct BlockAttentionParams {
  DType dtype;
  int64_t B, C, Q, K, S, H, G, D;  // K: number of new rows
  const void *q, *k_new, *v_new;   // [B,Q,H,D], [B,K,G,D] or null
  void *k_cache, *v_cache;         // [C,S,G,D]
  void* out;                       // [B,Q,H,D] contiguous
  float* lse;                      // [B,Q,H] contiguous
  int64_t q_stride[3], k_new_stride[3], v_new_stride[3], k_cache_stride[3],
      v_cache_stride[3];      // batch, row, head
  const int32_t* cache_rows;  // [B] cache row of each batch row, out of range: unused; null: b
  const int32_t* slots;       // [B,Q]; null: row i has slot i
  const int32_t* k_slots;     // [B,K] slots of the new rows; null: those of the query rows, K = Q
  const int32_t* visible;   // [B,Q,ceil(K/32)], bit 0: new row is not visible to a query; null: all
  const int32_t* kv_range;  // [B,N,2] half-open, ascending; null: [0,S)
  int64_t N;
  int64_t causal_block;               // 0: full; 1: causal; n: block-causal
  PerRow<int32_t> block_origin;       // slot at which block 0 starts; slots before it form block -1
  const int32_t *q_limit, *k_order;   // [B,Q], [B,S]: key visible iff order <= limit
  int64_t window_left, window_right;  // visible slots around the query's own; -1: unbounded
  float softcap;                      // 0: none
  float scale;
  float* workspace;  // size as requested by the kernel

  DLM_HD bool is_used(int64_t b) const {
    return !cache_rows || (cache_rows[b] >= 0 && cache_rows[b] < C);
  }
  // Cache row of a batch row; arbitrary if the batch row is unused.
  DLM_HD int64_t cache_row(int64_t b) const {
    return !cache_rows ? b : is_used(b) ? cache_rows[b] : 0;
  }
  // Slot of a query row; -1 if it is unused.
  DLM_HD int64_t slot_of(int64_t b, int64_t row) const {
    if (!is_used(b)) return -1;
    return slots ? slots[b * Q + row] : row;
  }
  // Slot of a new row; -1 if it is not written.
  DLM_HD int64_t new_slot_of(int64_t b, int64_t row) const {
    if (!k_slots) return slot_of(b, row);
    return is_used(b) ? k_slots[b * K + row] : -1;
  }
  // Whether `visible`, which must be given, lets a query see a new row.
  DLM_HD bool shows(int64_t b, int64_t query, int64_t row) const {
    return visible[(b * Q + query) * ((K + 31) / 32) + row / 32] >> row % 32 & 1;
  }
};

enum class Distribution : int32_t { kRaw, kTempered, kFiltered };

struct TokenConfidenceParams {
  DType dtype;
  int64_t N, R, V;
  const void *logits, *uncond_logits;  // [R,V], last dimension contiguous
  int64_t logits_stride, uncond_stride;
  const int32_t* row_map;  // [N] logits row of each output row, -1: unused; null: row n
  const int64_t* given;    // [N], -1: none
  PerRow<float> cfg_scale;
  const float* bias;  // [P,V]
  int64_t bias_rows_per_value;
  const int64_t* banned;  // [P,K], -1: none
  int64_t banned_count, banned_rows_per_value;
  const int32_t* bitmask;  // [P,ceil(V/32)], bit 1: allowed
  int64_t bitmask_words, bitmask_rows_per_value;
  PerRow<float> temperature, top_p;
  PerRow<int32_t> top_k;
  bool top_p_first, keep_crossing;
  Distribution distribution;
  RandomKey random;
  int64_t *token, *argmax;  // [N]
  float *confidence, *margin, *entropy, *logsumexp,
      *p_given;    // [N]; margin, entropy: null if not requested
  int32_t* flags;  // [N]
  float* floor;    // [N] lowest logit that the filters keep, -inf: all; null: not requested
  // A shard of a vocabulary (common/shard.h) holds tokens [first, V). Pointers to arrays with a
  // column, bit or row per token point to where token 0 would be, although it is not part of the
  // array.
  int64_t first;
  int64_t* partial;  // [N,kShardWords], replaces all other results; null: the whole vocabulary
  DLM_HD int64_t columns() const { return V - first; }
};
// Bits of TokenConfidenceParams::flags.
constexpr int32_t kFlagNaN = 1, kFlagPosInf = 2, kFlagNothingAllowed = 4;

// Maximum number of slots in a row's window: what fits into a kernel's scratch on the stack, or
// into shared memory.
constexpr int64_t kMaxSlots = 4096;

enum class Rule : int32_t {
  kNone,
  kAll,
  kThreshold,
  kFactor,
  kEntropyBound,
  kEntropySum,
  kBernoulli
};

struct SelectTokensParams {
  int64_t B, W;
  const float* score;              // [B,W] contiguous
  const uint8_t *eligible, *gate;  // [B,W]
  const float* cost;               // [B,W]: entropies, or probabilities for kBernoulli
  Rule rule;
  PerRow<float> parameter;
  bool strict;
  PerRow<int32_t> need, fill, cap;
  PerRow<float> order_temperature;
  RandomKey random;
  bool* selected;  // [B,W]
  int32_t* count;  // [B]
};

// Bits of a canvas position's state.
constexpr uint8_t kStateOpen = 1, kStateFrozen = 2, kStateEdited = 4, kStateDirty = 8;
// Columns of the per-row info of remask_.
enum Info : int32_t {
  kInfoOpenWindow,
  kInfoOpen,
  kInfoCommitted,
  kInfoEdited,
  kInfoRemasked,
  kInfoChanged,
  kInfoFirstEos,
  kInfoPrefix,
  kInfoDone,
  kInfoColumns
};
enum class EosPolicy : int32_t { kNone, kFill };

struct RemaskParams {
  int64_t B, T, W;
  int64_t* tokens;          // [B,T]
  uint8_t* state;           // [B,T]
  const int32_t* position;  // [B,W] canvas position of each slot, -1: unused
  const int64_t* proposal;  // [B,W]
  const uint8_t *commit, *edit, *remask, *renoise;  // [B,W]
  const float* confidence;                          // [B,W]
  int32_t* commit_step;                             // [B,T]
  float* commit_confidence;                         // [B,T]
  int32_t* step;                                    // [B]
  PerRow<int64_t> seed;
  PerRow<int32_t> origin;  // canvas position at which the request starts (left padding)
  PerRow<int32_t> end;     // canvas position after the request's last, at most T
  int64_t mask_token_id, vocab_size, fill_token_id;
  const int64_t* eos_token_ids;
  int64_t eos_count;
  EosPolicy eos_policy;
  int32_t* info;  // [B,kInfoColumns]
};

struct VerifyDraftsParams {
  DType dtype;
  int64_t B, W, V, R, Q;              // Q: rows of draft_logits
  const int64_t *drafts, *token;      // [B,W], -1: no draft here or later; [B,W+1]
  const void *logits, *draft_logits;  // [R,V], [Q,V], last dimension contiguous; null: compare
  int64_t logits_stride, draft_stride;
  const float *logsumexp, *draft_logsumexp;  // [B,W+1], [B,W]
  const int32_t *row_map, *draft_row_map;    // [B,W+1], [B,W], -1: unknown; null: consecutive rows
  const int64_t* banned;                     // [banned_count], -1: none
  int64_t banned_count;
  PerRow<float> temperature;
  float leniency;
  RandomKey random;   // position: [B], that of the first draft
  int32_t* accepted;  // [B]
  int64_t* tokens;    // [B,W+1]
};

// Columns of the per-row info of splice_.
enum SpliceInfo : int32_t { kSpliceInserted, kSpliceRemoved, kSpliceOverflow, kSpliceColumns };

struct SpliceParams {
  int64_t B, T, W;
  int64_t* tokens;           // [B,T]
  uint8_t* state;            // [B,T]; this and the next two: null if not kept
  int32_t* commit_step;      // [B,T]
  float* commit_confidence;  // [B,T]
  const int32_t* start;      // [B] canvas position of slot 0, -1: row is left alone
  const int32_t* insert;     // [B,W] positions to insert before each slot
  const uint8_t* remove;     // [B,W]
  int32_t* length;           // [B] live positions; null: the span [start, end) keeps its size
  PerRow<int32_t> end;
  int64_t fill_token_id, pad_token_id;
  int32_t* source;  // [B,T] previous position of each position's content, -1: new
  int32_t* info;    // [B,kSpliceColumns]
};

struct LmHeadConfidenceParams {
  TokenConfidenceParams rows;  // per hidden state; without logits, whose dtype is `dtype`
  int64_t D;
  const void *hidden, *uncond_hidden;  // [R,D], last dimension contiguous
  const void* weight;                  // [V,D]
  int64_t hidden_stride, uncond_stride, weight_stride;
  const int32_t* used;  // [used_count] indices of the used output rows, ascending; null: all
  int64_t used_count;
  DLM_HD int64_t count() const { return used ? used_count : rows.N; }
  DLM_HD int64_t output_row(int64_t i) const { return used ? used[i] : i; }
};

// Maximum number of ids that top_candidates returns per row.
constexpr int64_t kMostCandidates = 64;

struct TopCandidatesParams {
  TokenConfidenceParams rows;  // logits, row map, banned, bitmask; without outputs
  int64_t k;
  int64_t* ids;      // [N,k], -1: fewer than k have a logit above -inf
  float* values;     // [N,k]
  float* logsumexp;  // [N]
};

struct LmHeadCandidatesParams {
  LmHeadConfidenceParams head;  // hidden states, weights, row map, banned, bitmask; without outputs
  int64_t k;
  int64_t* ids;  // as in TopCandidatesParams
  float *values, *logsumexp;
};

struct SoftEmbeddingParams {
  DType dtype, weight_dtype;
  int64_t N, R, V, D;
  const void *logits, *weight;  // [R,V], [V,D], last dimensions contiguous
  int64_t logits_stride, weight_stride;
  const int32_t* row_map;  // [N], -1: unused; null: row n
  PerRow<float> temperature;
  const int64_t* argmax;  // [N] as computed by token_confidence, -1: none
  const float* floor;     // [N] as computed by token_confidence; null: all are kept
  int64_t mask_token_id;  // receives what is not kept; -1: kept ones are renormalized
  void* out;              // [N,D] contiguous, dtype of weight
};

}  // namespace dlm
