// SPDX-License-Identifier: Apache-2.0
#include "amx/kernels.h"

#include "cpu/block_attention_amx.cpp"

namespace dlm::cpu::amx {
namespace {

// Reads on behind a row's last element.
struct TailNotPadded : TileWords {
  static Words words(const BFloat16* p) { return TileWords::words(p); }
  static Words words(const BFloat16* p, int64_t) { return TileWords::words(p); }
};
struct InfiniteTimesZero : TileWords {
  static Words or_zero(Words x) { return x; }
};

}  // namespace
}  // namespace dlm::cpu::amx

namespace amx {

dlm::cpu::BlockAttentionKernels kernels(KernelFault fault) {
  using namespace dlm::cpu::amx;
  switch (fault) {
    case KernelFault::kTailNotPadded:
      return kernels_of<TailNotPadded>();
    case KernelFault::kInfiniteTimesZero:
      return kernels_of<InfiniteTimesZero>();
    default:
      return block_attention(dlm::DType::kBFloat16);
  }
}

}  // namespace amx
