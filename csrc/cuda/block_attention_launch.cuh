// SPDX-License-Identifier: Apache-2.0
// The launches of block attention. scatter_kernel writes the new K and V rows to their slots. An
// attend kernel then computes softmax(q k^T) v by row tiles: block_attention_narrow.cuh for few
// rows, where the slots are split, block_attention_wide.cuh for many, block_attention_fp32.cuh in
// float32.
//   scatter: one warp per row and 8 heads, 16 bytes per lane; limited by latency
//   hide: if queries do not see all new rows, one warp per query
// Nothing depends on the device, and no bit depends on the batch size: a request's result is the
// same in any batch, and on every GPU with the same rounding. Instructions: sm_80.
#pragma once
#include "cuda/block_attention_fp32.cuh"
#include "cuda/block_attention_narrow.cuh"
#include "cuda/block_attention_wide.cuh"

namespace dlm::cuda {

// --- scatter -----------------------------------------------------------------------------------

constexpr int kScatterHeads = 8;

struct ScatterParams {
  BlockAttentionParams op;
  int32_t row_chunks, head_groups;  // 16-byte chunks of a head's row; groups of kScatterHeads
  int64_t warps;
  int32_t* claims;    // [B, S]: the last row that names a slot, for slots that are named
  uint32_t* arrived;  // initialized to 0
  int64_t arrived_count;
};

// A warp examines all rows after its own for one with the same slot. With more rows than this, the
// last row of each slot is determined beforehand.
constexpr int64_t kMostRowsUnclaimed = 512;

// The slots of the new rows, [B, K]; null: new row i has slot i.
DLM_HD const int32_t* named_slots(const BlockAttentionParams& op) {
  return op.k_slots ? op.k_slots : op.slots;
}

// One thread per row. In the first pass, any row of a slot writes its index, overwriting whatever
// was there; in the second, the last row does.
template <bool first>
__global__ void __launch_bounds__(kAttendThreads)
    claim_kernel(const __grid_constant__ ScatterParams p) {
  const BlockAttentionParams& op = p.op;
  const int64_t i = int64_t(blockIdx.x) * kAttendThreads + threadIdx.x;
  if (i >= op.B * op.K) return;
  const int64_t b = i / op.K;
  const int32_t row = int32_t(i - b * op.K), slot = int32_t(op.new_slot_of(b, row));
  if (slot < 0 || slot >= op.S) return;
  int32_t* claim = p.claims + b * op.S + slot;
  if (first) {
    atomicExch(claim, row);
  } else {
    atomicMax(claim, row);
  }
}

DLM_DEVICE bool overwritten(const int32_t* slots, int64_t row, int64_t rows, int32_t slot) {
  for (int64_t i = row + 1; i < rows; i += 32) {
    const int64_t other = i + threadIdx.x % 32;
    if (__any_sync(~0u, other < rows && slots[other] == slot)) return true;
  }
  return false;
}

// Of rows that name the same slot the last one is kept, in whatever order they run.
template <bool claimed>
__global__ void __launch_bounds__(kAttendThreads)
    scatter_kernel(const __grid_constant__ ScatterParams p) {
  const BlockAttentionParams& op = p.op;
  const int64_t thread = int64_t(blockIdx.x) * kAttendThreads + threadIdx.x;
  if (thread < p.arrived_count) p.arrived[thread] = 0;
  int64_t i = thread / 32;
  if (i >= p.warps) return;
  const int64_t first_head = i % p.head_groups * kScatterHeads;
  i /= p.head_groups;
  const int64_t b = i / op.K, row = i % op.K;
  const int32_t* all = named_slots(op);
  const int32_t* slots = all ? all + b * op.K : nullptr;
  const int32_t slot = int32_t(op.new_slot_of(b, row));
  if (slot < 0 || slot >= op.S) return;
  if (claimed) {
    if (p.claims[b * op.S + slot] != row) return;
  } else if (slots && overwritten(slots, row, op.K, slot)) {
    return;
  }

  const int64_t heads = min(op.G - first_head, int64_t(kScatterHeads));
  const int64_t bytes = op.dtype == DType::kFloat32 ? 4 : 2;
  const auto copy = [&](const void* from, const int64_t* from_stride, void* to,
                        const int64_t* to_stride) {
    const char* source =
        static_cast<const char*>(from) +
        (b * from_stride[0] + row * from_stride[1] + first_head * from_stride[2]) * bytes;
    char* target = static_cast<char*>(to) +
                   (op.cache_row(b) * to_stride[0] + slot * to_stride[1] + first_head * to_stride[2]) * bytes;
    for (int32_t c = int32_t(threadIdx.x) % 32; c < int32_t(heads) * p.row_chunks; c += 32) {
      const int32_t head = c / p.row_chunks, chunk = c % p.row_chunks;
      ptx::st_global_16(
          target + head * to_stride[2] * bytes + chunk * 16,
          ptx::ld_global_stream_16(source + head * from_stride[2] * bytes + chunk * 16));
    }
  };
  copy(op.k_new, op.k_new_stride, op.k_cache, op.k_cache_stride);
  copy(op.v_new, op.v_new_stride, op.v_cache, op.v_cache_stride);
}

// One warp per query: sets a bit for each slot whose new row `visible` hides from it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    hide_kernel(const __grid_constant__ AttendParams p) {
  const BlockAttentionParams& op = p.op;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= op.B * op.Q) return;  // warp-uniform
  const int64_t b = i / op.Q;
  const int32_t lane = int32_t(threadIdx.x) % 32;
  uint32_t* words = p.hidden + i * p.hidden_words;
  for (int32_t w = lane; w < p.hidden_words; w += 32) words[w] = 0;
  __syncwarp();
  for (int64_t row = lane; row < op.K; row += 32) {
    const int64_t slot = op.new_slot_of(b, row);
    if (slot < 0 || slot >= op.S || op.shows(b, i - b * op.Q, row)) continue;
    atomicOr(&words[slot / 32], 1u << slot % 32);
  }
}

// --- host code ---------------------------------------------------------------------------------

// Heads are zero-padded in shared memory: 80, 96 and 112 to 128, 192 to 256.
inline int32_t padded_head_dim(const BlockAttentionParams& op) {
  const int32_t least = op.dtype == DType::kFloat32 ? 32 : 64;
  int32_t padded = least;
  while (padded < op.D) padded *= 2;
  return padded;
}

// Number of rows of one request, over all its heads, from which a wide tile pays off: it has no
// splits, so only this many rows fill the device. The rule depends on a request, not on the batch,
// because narrow tiles give different bits.
constexpr int64_t kRowsOfWide = 128 * 128;
// Number of blocks that fills a device without splitting the slots: 2 for each of 132
// multiprocessors.
constexpr int64_t kEnoughBlocks = 264;

inline AttendForm form_of(const BlockAttentionParams& op) {
  const float scale = op.scale * kLog2E;
  if (op.softcap > 0.0f || !std::isnormal(scale) || scale < 0.0f) return AttendForm::kGeneral;
  const bool wide = op.dtype != DType::kFloat32 && op.D <= 256 && op.Q * op.H >= kRowsOfWide;
  return wide ? AttendForm::kWide : AttendForm::kNarrow;
}

inline int32_t tile_rows(const BlockAttentionParams& op, AttendForm form) {
  if (op.dtype == DType::kFloat32) return op.D > 256 ? 16 : 32;
  return form != AttendForm::kWide ? kNarrowRows : op.D > 128 ? 64 : 128;
}

// Scratch memory, in floats, each part a multiple of 16 bytes.
struct AttendScratch {
  int64_t partial, norms, arrived, hidden, claims;
  int64_t all() const { return partial + norms + arrived + hidden + claims; }
};
inline AttendScratch attend_scratch(const AttendParams& p) {
  const auto padded = [](int64_t floats) { return (floats + 3) / 4 * 4; };
  const BlockAttentionParams& op = p.op;
  const int64_t rows = op.B * op.Q * op.H, parts = p.spread ? p.splits : p.splits > 1;
  const bool claims = op.k_new && named_slots(op) && op.K > kMostRowsUnclaimed;
  return {padded(rows * parts * op.D), p.spread ? padded(rows * parts * 2) : 0,
          p.spread ? padded(op.B * op.G * p.row_tiles) : 0,
          op.visible ? padded(op.B * op.Q * p.hidden_words) : 0, claims ? padded(op.B * op.S) : 0};
}

inline AttendParams attend_params(const BlockAttentionParams& op, AttendForm form,
                                  float* workspace) {
  AttendParams p{};
  p.op = op;
  p.group = int32_t(op.H / op.G);
  p.rows = int32_t(op.Q * p.group);
  p.form = form;
  p.scale = op.scale * kLog2E;
  const int32_t rows = tile_rows(op, p.form);
  p.row_tiles = (p.rows + rows - 1) / rows;
  const bool split = p.form != AttendForm::kWide && op.S > kSplitSlots;
  p.splits = split ? int32_t((op.S + kSplitSlots - 1) / kSplitSlots) : 1;
  p.spread = split && op.B * op.G * p.row_tiles < kEnoughBlocks;
  // Three words are read starting at that of a slot, and part of a tile may extend beyond the last
  // word.
  p.hidden_words = op.visible ? int32_t((op.S + 31) / 32 + 4) : 0;
  const AttendScratch scratch = attend_scratch(p);
  p.partial = workspace;
  if (op.visible && workspace) {
    const int64_t before = scratch.partial + scratch.norms + scratch.arrived;
    p.hidden = reinterpret_cast<uint32_t*>(workspace + before);
  }
  if (p.spread && workspace) {
    p.partial_norm = reinterpret_cast<float2*>(workspace + scratch.partial);
    p.arrived = reinterpret_cast<uint32_t*>(workspace + scratch.partial + scratch.norms);
  }
  return p;
}

inline AttendParams attend_params(const BlockAttentionParams& op, float* workspace) {
  return attend_params(op, form_of(op), workspace);
}

inline int64_t attend_workspace(const BlockAttentionParams& op) {
  return attend_scratch(attend_params(op, nullptr)).all();
}

// Writes the new rows, clears the counters of the finished splits, and determines what is hidden.
inline cudaError_t start_scatter(const AttendParams& attend, float* workspace,
                                 cudaStream_t stream) {
  const BlockAttentionParams& op = attend.op;
  const AttendScratch scratch = attend_scratch(attend);
  ScatterParams p{};
  p.op = op;
  p.row_chunks = int32_t(op.D / (op.dtype == DType::kFloat32 ? 4 : 8));
  p.head_groups = int32_t((op.G + kScatterHeads - 1) / kScatterHeads);
  if (op.k_new) p.warps = op.B * op.K * p.head_groups;
  p.arrived = attend.arrived;
  p.arrived_count = attend.arrived ? scratch.arrived : 0;
  const auto start = [&](auto kernel, int64_t threads, const auto& params) {
    const int64_t blocks = (threads + kAttendThreads - 1) / kAttendThreads;
    return threads == 0 ? cudaSuccess
                        : launch(kernel, dim3(unsigned(blocks)), dim3(kAttendThreads), 0, stream,
                                 params);
  };
  const int64_t threads = p.warps * 32 > p.arrived_count ? p.warps * 32 : p.arrived_count;
  cudaError_t error = cudaSuccess;
  if (scratch.claims == 0) {
    error = start(scatter_kernel<false>, threads, p);
  } else {
    p.claims = reinterpret_cast<int32_t*>(workspace + scratch.all() - scratch.claims);
    error = start(claim_kernel<true>, op.B * op.K, p);
    if (error == cudaSuccess) error = start(claim_kernel<false>, op.B * op.K, p);
    if (error == cudaSuccess) error = start(scatter_kernel<true>, threads, p);
  }
  if (error != cudaSuccess || !attend.hidden) return error;
  return start(hide_kernel<kAttendThreads>, op.B * op.Q * 32, attend);
}

// The attend kernels of one element type and padded head dimension. Instantiated separately, since
// each takes nvcc a while.
template <class T, int kD>
cudaError_t start_attend(const AttendParams& p, cudaStream_t stream) {
  const int64_t blocks = p.op.B * p.op.G * p.row_tiles * (p.spread ? p.splits : 1);
  const auto start = [&](auto kernel, uint32_t smem, int parts = 1) {
    return launch(kernel, dim3(unsigned(blocks * parts)), dim3(kAttendThreads), smem, stream, p);
  };
  using Form = AttendForm;
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t smem = Fp32Tiling<kD>::kSmem.bytes;
    return p.form == Form::kGeneral ? start(attend_fp32_kernel<kD, Form::kGeneral>, smem)
                                    : start(attend_fp32_kernel<kD, Form::kNarrow>, smem);
  } else {
    if constexpr (kD <= 256) {
      if (p.form == Form::kWide) {
        return start(attend_wide_kernel<T, kD>, WideTiling<kD>::kSmem.bytes);
      }
    }
    const uint32_t smem = NarrowTiling<kD>::kSmem.bytes;
    const int parts = NarrowTiling<kD>::kParts;
    return p.form == Form::kGeneral
               ? start(attend_narrow_kernel<T, kD, Form::kGeneral>, smem, parts)
               : start(attend_narrow_kernel<T, kD, Form::kNarrow>, smem, parts);
  }
}

}  // namespace dlm::cuda
