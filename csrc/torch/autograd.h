// SPDX-License-Identifier: Apache-2.0
// What autograd must be told by an op that has no derivative: that it has none, and what it wrote.
// Below torch's own dispatch for autograd nobody else would: torch only warns in the backward pass,
// and takes what it saved of a tensor for unchanged.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>

#include "torch/symbols.h"

namespace dlm {

inline bool grad_mode() { return aoti_torch_grad_mode_is_enabled(); }

// Whether a gradient is asked for with respect to the tensor. The handle of the stable ABI points
// to an at::Tensor, which is one pointer to the object that knows.
inline bool requires_grad(const torch::stable::Tensor& t) {
  static const auto ask =
      torch_symbol<bool(const void*)>("libtorch_cpu.so", "_ZNK3c1010TensorImpl13requires_gradEv");
  return ask && ask(*reinterpret_cast<const void* const*>(t.get()));
}

// Tells autograd that the tensor is being written: a backward pass that needs its old content then
// raises an error, as after any other in-place op.
inline void bump_version(const torch::stable::Tensor& t) {
  static const auto bump = torch_symbol<void(const void*)>(
      "libtorch_cpu.so", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
  if (!bump) {  // the long way: a view has its base's version
    torch::stable::Tensor whole = t;
    torch::stable::Tensor nothing = torch::stable::narrow(whole, 0, 0, 0);
    torch::stable::zero_(nothing);
    return;
  }
  try {
    bump(t.get());
  } catch (const std::exception&) {
    // A tensor of torch.inference_mode, outside of it: it has no version, and autograd saves none.
  }
}

}  // namespace dlm
