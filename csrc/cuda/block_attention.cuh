// SPDX-License-Identifier: Apache-2.0
// Block attention: scatter_kernel writes the new K and V rows to their slots, an attend kernel
// (block_attention_mma.cuh, block_attention_fp32.cuh) computes softmax(q k^T) v by row tiles and,
// where the grid would be small, by splits of the slots, which combine_kernel then joins in order.
//   scatter: a warp for a row and 8 heads, 16 bytes a lane; bound by latency
//   combine: a warp for a row of the result; reads 4 D bytes a split: bound by memory
// Nothing depends on the device or on the batch size: a request's result has the same bits beside
// any others and on every GPU that rounds alike.
// Instructions: sm_80.
#pragma once
#include "cuda/block_attention.h"
#include "cuda/block_attention_fp32.cuh"
#include "cuda/block_attention_mma.cuh"

namespace dlm::cuda {

// --- scatter -----------------------------------------------------------------------------------

constexpr int kScatterHeads = 8;

struct ScatterParams {
  BlockAttentionParams op;
  int32_t row_chunks, head_groups;  // 16-byte chunks of a head's row; groups of kScatterHeads
  int64_t warps;
};

// Does a later row name the same slot? Of such rows the last one stays, in whatever order they run.
DLM_DEVICE bool overwritten(const int32_t* slots, int64_t row, int64_t rows, int32_t slot) {
  for (int64_t i = row + 1; i < rows; i += 32) {
    const int64_t other = i + threadIdx.x % 32;
    if (__any_sync(~0u, other < rows && slots[other] == slot)) return true;
  }
  return false;
}

template <AttentionFault fault = AttentionFault::kNone>
__global__ void __launch_bounds__(kAttendThreads)
    scatter_kernel(const __grid_constant__ ScatterParams p) {
  const BlockAttentionParams& op = p.op;
  int64_t i = int64_t(blockIdx.x) * (kAttendThreads / 32) + threadIdx.x / 32;
  if (i >= p.warps) return;
  const int64_t first_head = i % p.head_groups * kScatterHeads;
  i /= p.head_groups;
  const int64_t b = i / op.Q, row = i % op.Q;
  const int32_t* slots = op.slots ? op.slots + b * op.Q : nullptr;
  const int32_t slot = slots ? slots[row] : int32_t(row);
  if (slot < 0 || slot >= op.S) return;
  if (fault == AttentionFault::kFirstRowWins) {
    for (int64_t other = 0; slots && other < row; ++other) {
      if (slots[other] == slot) return;
    }
  } else if (slots && overwritten(slots, row, op.Q, slot)) {
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
                   (b * to_stride[0] + slot * to_stride[1] + first_head * to_stride[2]) * bytes;
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

// --- combine -----------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kAttendThreads)
    combine_kernel(const __grid_constant__ AttendParams p) {
  const int32_t D = int32_t(p.op.D);
  const int64_t row = int64_t(blockIdx.x) * (kAttendThreads / 32) + threadIdx.x / 32;
  if (row >= p.op.B * p.op.Q * p.op.H) return;
  const float2* norms = p.partial_norm + row * p.splits;
  Norm n;
  for (int s = 0; s < p.splits; ++s) n.maximum = fmaxf(n.maximum, norms[s].x);
  const float base = base_of(n.maximum);
  for (int s = 0; s < p.splits; ++s) {
    n.sum = fmaf(norms[s].y, ptx::exp2_approx(norms[s].x - base), n.sum);
  }
  for (int column = int(threadIdx.x) % 32 * 4; column < D; column += 128) {
    float4 sum{0, 0, 0, 0};
    for (int s = 0; s < p.splits; ++s) {
      if (norms[s].y == 0.0f) continue;
      const float weight = ptx::exp2_approx(norms[s].x - base);
      const float4 part =
          as_floats(ptx::ld_global_16(p.partial + (row * p.splits + s) * D + column));
      sum = {fmaf(part.x, weight, sum.x), fmaf(part.y, weight, sum.y), fmaf(part.z, weight, sum.z),
             fmaf(part.w, weight, sum.w)};
    }
    sum = {normalised(sum.x, n), normalised(sum.y, n), normalised(sum.z, n), normalised(sum.w, n)};
    T* out = static_cast<T*>(p.op.out) + row * D + column;
    if constexpr (std::is_same_v<T, float>) {
      ptx::st_global_16(out, as_words(sum.x, sum.y, sum.z, sum.w));
    } else {
      *reinterpret_cast<uint2*>(out) = make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
    }
  }
  if (threadIdx.x % 32 == 0) p.op.lse[row] = log_sum_exp(n);
}

// --- the host's part ---------------------------------------------------------------------------

// Slots of a split; it may depend on the shapes of one request, never on the batch. A split of 1024
// slots writes and reads back 3 % of the bytes of its K and V where 32 rows meet them.
struct SplitLength {
  int64_t blocks;  // of one request, unsplit: G * row tiles
  int32_t slots;
};
constexpr SplitLength kSplitLengths[] = {
    {16, 512},  // few heads: 128 blocks at 4096 slots and a batch of 1 at best
    {128, 1024},
    {INT64_MAX, INT32_MAX},  // one request alone fills most GPUs
};

inline int32_t tile_rows(const AttendParams& p) {
  if (p.op.dtype == DType::kFloat32) return kFp32Rows;
  return p.form != AttendForm::kWide ? kNarrowRows : p.op.D == 256 ? 64 : 128;
}

inline AttendForm form_of(const AttendParams& p) {
  const float softcap = p.op.softcap;
  if (!std::isnormal(p.scale) || softcap > kHighCap || (softcap > 0 && !std::isnormal(p.cap))) {
    return AttendForm::kLiteral;
  }
  const bool narrow = p.op.dtype == DType::kFloat32 || p.rows <= kNarrowRows;
  return narrow ? AttendForm::kNarrow : AttendForm::kWide;
}

inline AttendParams attend_params(const BlockAttentionParams& op, float* workspace) {
  AttendParams p{};
  p.op = op;
  p.group = int32_t(op.H / op.G);
  p.rows = int32_t(op.Q * p.group);
  p.scale = op.softcap > 0 ? op.scale / op.softcap : op.scale * kLog2E;
  p.cap = op.softcap > 0 ? op.softcap * kLog2E : 0.0f;
  p.form = form_of(p);
  p.row_tiles = (p.rows + tile_rows(p) - 1) / tile_rows(p);
  const SplitLength* length = kSplitLengths;
  while (op.G * p.row_tiles >= length->blocks) ++length;
  p.split_length = length->slots;
  p.splits = int32_t(op.S > p.split_length ? (op.S + p.split_length - 1) / p.split_length : 1);
  if (p.splits == 1) p.split_length = INT32_MAX;
  p.partial = workspace;
  if (workspace) {
    p.partial_norm = reinterpret_cast<float2*>(workspace + op.B * op.Q * op.H * p.splits * op.D);
  }
  return p;
}

inline int64_t attend_workspace(const BlockAttentionParams& op) {
  const int64_t splits = attend_params(op, nullptr).splits;
  return splits > 1 ? op.B * op.Q * op.H * splits * (op.D + 2) : 0;
}

inline const char* why_not_attend(const BlockAttentionParams& p) {
  const bool small = p.D == 32 && p.dtype == DType::kFloat32;
  if (!small && p.D != 64 && p.D != 128 && p.D != 256) {
    return "q must have a head dimension of 64, 128 or 256, or 32 in float32,";
  }
  if (p.S > INT32_MAX - 4096) return "k_cache must have fewer than 2^31 - 4096 slots";
  if (p.Q * p.H > INT32_MAX / 2) return "q must have fewer than 2^30 rows of heads a batch row";
  const AttendParams attend = attend_params(p, nullptr);
  if (p.B * p.G * attend.row_tiles * attend.splits > INT32_MAX) {
    return "q must have a smaller batch: the grid would exceed 2^31 blocks";
  }
  const int64_t in_16_bytes = p.dtype == DType::kFloat32 ? 4 : 8;
  const auto aligned = [&](const void* data, const int64_t* stride, int64_t B, int64_t rows,
                           int64_t heads) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           (B == 1 || stride[0] % in_16_bytes == 0) &&
           (rows == 1 || stride[1] % in_16_bytes == 0) &&
           (heads == 1 || stride[2] % in_16_bytes == 0);
  };
  if (!aligned(p.q, p.q_stride, p.B, p.Q, p.H)) {
    return "q must start every row at a multiple of 16 bytes";
  }
  if (p.k_new && !aligned(p.k_new, p.k_new_stride, p.B, p.Q, p.G)) {
    return "k_new must start every row at a multiple of 16 bytes";
  }
  if (p.v_new && !aligned(p.v_new, p.v_new_stride, p.B, p.Q, p.G)) {
    return "v_new must start every row at a multiple of 16 bytes";
  }
  if (!aligned(p.k_cache, p.k_cache_stride, p.B, p.S, p.G)) {
    return "k_cache must start every row at a multiple of 16 bytes";
  }
  if (!aligned(p.v_cache, p.v_cache_stride, p.B, p.S, p.G)) {
    return "v_cache must start every row at a multiple of 16 bytes";
  }
  return nullptr;
}

template <AttentionFault fault = AttentionFault::kNone>
cudaError_t start_scatter(const BlockAttentionParams& op, cudaStream_t stream) {
  ScatterParams p{op, int32_t(op.D / (op.dtype == DType::kFloat32 ? 4 : 8)),
                  int32_t((op.G + kScatterHeads - 1) / kScatterHeads), 0};
  p.warps = op.B * op.Q * p.head_groups;
  const int64_t blocks = (p.warps + kAttendThreads / 32 - 1) / (kAttendThreads / 32);
  return launch(scatter_kernel<fault>, dim3(unsigned(blocks)), dim3(kAttendThreads), 0, stream, p);
}

// The attend kernels of one element type and head dimension; instantiated apart, since each takes
// nvcc a while.
template <class T, int kD, AttentionFault fault = AttentionFault::kNone>
cudaError_t start_attend(const AttendParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.op.B * p.op.G * p.row_tiles * p.splits)), block(kAttendThreads);
  const auto start = [&](auto kernel, uint32_t smem) {
    return launch(kernel, grid, block, smem, stream, p);
  };
  using Form = AttendForm;
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t smem = Fp32Tiling<kD>::kSmem.bytes;
    return p.form == Form::kLiteral ? start(attend_fp32_kernel<kD, Form::kLiteral>, smem)
                                    : start(attend_fp32_kernel<kD, Form::kNarrow>, smem);
  } else {
    const uint32_t narrow = AttendTiling<kD, Form::kNarrow>::kSmem.bytes;
    const uint32_t wide = AttendTiling<kD, Form::kWide>::kSmem.bytes;
    switch (p.form) {
      case Form::kNarrow:
        return start(attend_kernel<T, kD, Form::kNarrow, fault>, narrow);
      case Form::kWide:
        return start(attend_kernel<T, kD, Form::kWide, fault>, wide);
      default:
        return start(attend_kernel<T, kD, Form::kLiteral, fault>, narrow);
    }
  }
}

#ifndef DLM_SIMT
extern template cudaError_t start_attend<float, 32>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 256>(const AttendParams&, cudaStream_t);
#endif

template <class T>
cudaError_t start_combine(const AttendParams& p, cudaStream_t stream) {
  const int64_t rows = p.op.B * p.op.Q * p.op.H, rows_a_block = kAttendThreads / 32;
  return launch(combine_kernel<T>, dim3(unsigned((rows + rows_a_block - 1) / rows_a_block)),
                dim3(kAttendThreads), 0, stream, p);
}

template <class T>
cudaError_t start_by_head_dim(const AttendParams& p, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  if (p.op.D == 64) error = start_attend<T, 64>(p, stream);
  if (p.op.D == 128) error = start_attend<T, 128>(p, stream);
  if (p.op.D == 256) error = start_attend<T, 256>(p, stream);
  if constexpr (std::is_same_v<T, float>) {
    if (p.op.D == 32) error = start_attend<T, 32>(p, stream);
  }
  return error != cudaSuccess || p.splits == 1 ? error : start_combine<T>(p, stream);
}

inline cudaError_t start_block_attention(const BlockAttentionParams& op, float* workspace,
                                         cudaStream_t stream) {
  if (op.k_new) {
    const cudaError_t error = start_scatter(op, stream);
    if (error != cudaSuccess) return error;
  }
  const AttendParams p = attend_params(op, workspace);
  switch (op.dtype) {
    case DType::kFloat32:
      return start_by_head_dim<float>(p, stream);
    case DType::kBFloat16:
      return start_by_head_dim<BFloat16>(p, stream);
    default:
      return start_by_head_dim<Float16>(p, stream);
  }
}

}  // namespace dlm::cuda
