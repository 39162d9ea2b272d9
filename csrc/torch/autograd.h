// SPDX-License-Identifier: Apache-2.0
// What an op without a derivative has to tell autograd: that it has none, and which tensors it
// wrote. Below torch's own autograd dispatch nothing else would: torch would only warn in the
// backward pass, and would assume that tensors it saved are unchanged.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>

#include "torch/symbols.h"

namespace dlm {

inline bool grad_mode() { return aoti_torch_grad_mode_is_enabled(); }

// Whether a gradient with respect to the tensor is requested. The handle of the stable ABI points
// to an at::Tensor, which is a single pointer to the TensorImpl that holds the flag.
inline bool requires_grad(const torch::stable::Tensor& t) {
  static const auto ask =
      torch_symbol<bool(const void*)>("libtorch_cpu.so", "_ZNK3c1010TensorImpl13requires_gradEv");
  return ask && ask(*reinterpret_cast<const void* const*>(t.get()));
}

// Tells autograd that the tensor is written: a backward pass that needs its old content then raises
// an error, as after any other in-place op.
inline void bump_version(const torch::stable::Tensor& t) {
  static const auto bump = torch_symbol<void(const void*)>(
      "libtorch_cpu.so", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
  if (!bump) {  // fallback: a view shares the version of its base
    torch::stable::Tensor whole = t;
    torch::stable::Tensor nothing = torch::stable::narrow(whole, 0, 0, 0);
    torch::stable::zero_(nothing);
    return;
  }
  try {
    bump(t.get());
  } catch (const std::exception&) {
    // An inference tensor used outside torch.inference_mode: it has no version, and autograd saves
    // none.
  }
}

}  // namespace dlm
