// SPDX-License-Identifier: Apache-2.0
#include "cpu/soft_embedding.h"

#include <algorithm>

#include "torch/check.h"
#include "torch/ops.h"
#include "torch/token_confidence.h"
#ifdef DLM_WITH_CUDA
#include "cuda/soft_embedding.h"
#include "cuda/token_confidence.h"
#include "torch/cuda_stream.h"
#endif

namespace dlm {
namespace {

// The maximum of each row, and what top-k keeps, computed by token_confidence; its other outputs
// are discarded. Owns the memory of all outputs.
struct RowStatistics {
  RowStatistics(const Check& check, const SoftEmbeddingParams& p, PerRow<int32_t> top_k)
      : ids(check.empty("workspace", {2, p.N}, ScalarType::Long)),
        floats(check.empty("workspace", {4, p.N}, ScalarType::Float)),
        flags(check.empty("workspace", {1, p.N}, ScalarType::Int)) {
    op.dtype = p.dtype;
    op.N = p.N, op.R = p.R, op.V = p.V;
    op.logits = p.logits, op.logits_stride = p.logits_stride;
    op.row_map = p.row_map;
    op.bias_rows_per_value = op.banned_rows_per_value = op.bitmask_rows_per_value = p.N;
    op.top_k = top_k;
    op.distribution = top_k ? Distribution::kFiltered : Distribution::kRaw;
    op.token = static_cast<int64_t*>(ids.mutable_data_ptr());
    op.argmax = op.token + p.N;
    float* x = static_cast<float*>(floats.mutable_data_ptr());
    op.confidence = x, op.logsumexp = x + p.N, op.p_given = x + 2 * p.N, op.floor = x + 3 * p.N;
    op.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
  }

  TokenConfidenceParams op{};
  Tensor ids, floats, flags;
};

// Checks values on the CPU, where reading them does not make the host wait.
void check_values(const Check& check, const SoftEmbeddingParams& p, const MaybeTensor& temperature,
                  const MaybeTensor& top_k, PerRow<int32_t> k) {
  check.indices("row_map", p.row_map, p.N, p.R);
  check.temperatures("temperature", temperature);
  for (int64_t i = 0; top_k && i < top_k->numel(); ++i) {
    if (k.data[i] >= 0) continue;
    check.that(false, "top_k must be 0 (off) or positive; got ", k.data[i], " at ", i);
  }
}

}  // namespace

Tensor soft_embedding(const Tensor& logits, const Tensor& weight, const MaybeTensor& row_map,
                      const MaybeTensor& temperature, const MaybeTensor& top_k,
                      int64_t mask_token_id) {
  const Check check("soft_embedding", "logits", logits);
  SoftEmbeddingParams p{};
  check.dtype("logits", logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("logits", logits, {-1, -1});
  check.rows_dense("logits", logits);
  p.R = logits.size(0);
  const int64_t V = p.V = logits.size(1);
  check.that(V >= 1, "logits must have at least one column; got ", Check::shape(logits));
  check.device("weight", weight);
  check.dtype("weight", weight, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check.sizes("weight", weight, {V, -1});
  check.rows_dense("weight", weight);
  p.D = weight.size(1);
  p.dtype = element_type(logits);
  p.weight_dtype = element_type(weight);
  p.logits = logits.const_data_ptr();
  p.logits_stride = logits.stride(0);
  p.weight = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  p.row_map = check.dense<int32_t>("row_map", row_map, {-1});
  const int64_t N = p.N = row_map ? row_map->numel() : p.R;
  p.temperature = check.per_row<float>("temperature", temperature, N);
  const PerRow<int32_t> k = check.per_row<int32_t>("top_k", top_k, N);
  check.that(mask_token_id >= -1 && mask_token_id < V, "mask_token_id must be -1 or in [0, ", V,
             "); got ", mask_token_id);
  check.that(top_k || mask_token_id < 0, "top_k is required by mask_token_id; got None");
  p.mask_token_id = mask_token_id;
  if (logits.is_cpu()) check_values(check, p, temperature, top_k, k);

  check.not_differentiable({{"logits", logits}, {"weight", weight}, {"temperature", temperature}});

  Tensor out = check.empty("out", {N, p.D}, weight.scalar_type());
  p.out = out.mutable_data_ptr();
  if (N == 0 || p.D == 0) return out;
  RowStatistics of_rows(check, p, k);
  p.argmax = of_rows.op.argmax;
  p.floor = top_k ? of_rows.op.floor : nullptr;

#ifdef DLM_WITH_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(check, logits);
    call.supports(cuda::unsupported_token_confidence(of_rows.op));
    call.supports(cuda::unsupported_soft_embedding(p));
    const int64_t bytes =
        std::max(cuda::token_confidence_workspace(of_rows.op), cuda::soft_embedding_workspace(p));
    Tensor workspace = check.empty("workspace", {bytes}, ScalarType::Byte);
    void* scratch = workspace.mutable_data_ptr();
    call.succeeded(cuda::run_token_confidence(of_rows.op, scratch, call.stream()));
    call.succeeded(cuda::run_soft_embedding(p, scratch, call.stream()));
    return out;
  }
#endif

  token_confidence_on_cpu(check, of_rows.op);
  torch::stable::parallel_for(0, cpu::soft_embedding_items(p), 1, [&](int64_t begin, int64_t end) {
    cpu::soft_embedding(p, begin, end);
  });
  return out;
}

}  // namespace dlm
