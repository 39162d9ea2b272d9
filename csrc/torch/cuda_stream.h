// SPDX-License-Identifier: Apache-2.0
// What an op needs around its CUDA kernel:
//   const CudaCall call(check, score);              sets torch's device and stream for the scope
//   call.supports(cuda::unsupported_<op>(p));       before anything is written
//   call.succeeded(cuda::run_<op>(p, call.stream()));
// The function that returns torch's current stream is in libtorch_cuda, which a CPU-only torch does
// not have, and which torch has loaded by the time a CUDA tensor exists: it is looked up then.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/check.h"
#include "torch/symbols.h"

namespace dlm {

// Null for the default stream, as in CUDA.
inline void* current_cuda_stream(int32_t device) {
  static const auto getter = torch_symbol<int32_t(int32_t, void**)>(
      "libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (!getter || getter(device, &stream) != 0) {
    throw std::runtime_error(
        "dlmkernels: this build of torch does not provide the current CUDA stream");
  }
  return stream;
}

class CudaCall {
 public:
  CudaCall(const Check& check, const Tensor& anchor)
      : check_(check),
        guard_(anchor.get_device_index()),
        stream_(current_cuda_stream(anchor.get_device_index())) {}

  void* stream() const { return stream_; }
  void supports(const char* why_not) const {
    if (why_not) check_.that(false, why_not, " on CUDA");
  }
  void succeeded(int error) const {
    if (error == 0) return;
    const char* reason = cudaGetErrorString(static_cast<cudaError_t>(error));
    check_.failed("the CUDA kernel could not be started: ", reason);
  }

 private:
  const Check& check_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace dlm
