// SPDX-License-Identifier: Apache-2.0
// Random hidden states, weights and arguments for lm_head_confidence. Products are of small whole
// numbers, so that every order of addition gives the same sum; logits are those sums, times a power
// of two, rounded to the type: what token_confidence makes of them is expected.
#pragma once
#include "cuda/lm_head_confidence.cuh"
#include "kernels/confidence_case.h"

namespace check {

struct HeadCase : ConfidenceCase {
  // More of `with`: rows start anywhere; real numbers, whose sums depend on the order of additions,
  // so that a result may only be compared with the same kernel's.
  static constexpr unsigned kStrided = 1u << 20, kReal = 1u << 21;

  dlm::LmHeadConfidenceParams head{};
  Array<uint8_t> hidden, uncond_hidden, weight;

  HeadCase(dlm::DType dtype, int64_t N, int64_t V, int64_t D, unsigned with_,
           dlm::Distribution distribution, uint64_t random_seed)
      : ConfidenceCase(dtype, N, V, with_ & ~(kShifted | kPeaked | kTwoValues), distribution,
                       random_seed) {
    Random random(random_seed + 77);
    const int64_t size = dlm::element_size(dtype), R = p.R;
    const bool strided = with_ & kStrided;
    const int64_t start = strided ? 1 + random.below(6) : 0;
    head.D = D;
    const auto strides = [&] {
      return strided ? D + 1 + random.below(9) : (D + 15) / 16 * 16 + 16;
    };
    head.hidden_stride = strides(), head.uncond_stride = strides(), head.weight_stride = strides();
    const auto make = [&](Array<uint8_t>& to, int64_t rows, int64_t stride, int most, double unit) {
      to = Array<uint8_t>(size_t(size * (start + stride * (rows - 1) + std::max<int64_t>(D, 1))));
      for (int64_t i = 0; i < int64_t(to.size()) / size; ++i) put(to, i, NAN);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t d = 0; d < D; ++d) {
          const double x = with_ & kReal ? most * random.normal()
                                         : double(random.below(uint32_t(2 * most + 1))) - most;
          put(to, start + r * stride + d, float(unit * x));
        }
      }
      return to.data() + start * size;
    };
    const double unit = std::exp2(-std::round(std::log2(3.0 * std::sqrt(double(D) + 1))));
    head.hidden = make(hidden, R, head.hidden_stride, with_ & kTies ? 1 : 4, 1);
    head.weight = make(weight, V, head.weight_stride, with_ & kTies ? 1 : 4, unit);
    uint8_t* uncond = make(uncond_hidden, R, head.uncond_stride, 3, 1);
    if (with_ & kGuidance) head.uncond_hidden = uncond;
    if (with_ & kSpecial && D > 0) {
      const auto at = [&](int64_t rows, int64_t stride) {
        return start + int64_t(random.below(uint32_t(rows))) * stride + random.below(uint32_t(D));
      };
      put(hidden, at(R, head.hidden_stride), NAN);
      for (const float x : {INFINITY, -INFINITY, float(NAN)})
        put(weight, at(V, head.weight_stride), x);
    }
    fill_logits(logits, head.hidden, head.hidden_stride, p.logits_stride);
    fill_logits(this->uncond, uncond, head.uncond_stride, p.uncond_stride);
    expect();
    head.rows = p;
    head.rows.logits = head.rows.uncond_logits = nullptr;
    head.rows.logits_stride = head.rows.uncond_stride = 0;
    workspace = Array<uint8_t>(size_t(dlm::cuda::head_workspace(head)), 0xff);
  }

  cudaError_t start() {
    return dlm::cuda::start_lm_head_confidence(head, workspace.data(), nullptr);
  }

 private:
  void put(Array<uint8_t>& to, int64_t i, float x) const {
    const auto write = [&](auto element) {
      memcpy(&to[size_t(i) * sizeof element], &element, sizeof element);
    };
    if (p.dtype == dlm::DType::kFloat32) write(x);
    if (p.dtype == dlm::DType::kBFloat16) write(dlm::from_float<dlm::BFloat16>(x));
    if (p.dtype == dlm::DType::kFloat16) write(dlm::from_float<dlm::Float16>(x));
  }
  float get(const void* from, int64_t i) const {
    if (p.dtype == dlm::DType::kFloat32) return static_cast<const float*>(from)[i];
    const uint16_t bits = static_cast<const uint16_t*>(from)[i];
    return p.dtype == dlm::DType::kBFloat16 ? dlm::to_float(dlm::BFloat16{bits})
                                            : dlm::to_float(dlm::Float16{bits});
  }
  void fill_logits(Array<uint8_t>& to, const void* rows, int64_t stride, int64_t to_stride) const {
    std::vector<float> row(size_t(head.D));
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t d = 0; d < head.D; ++d) row[size_t(d)] = get(rows, r * stride + d);
      for (int64_t v = 0; v < p.V; ++v) {
        float sum = 0;
        for (int64_t d = 0; d < head.D; ++d)
          sum += row[size_t(d)] * get(head.weight, v * head.weight_stride + d);
        put(to, r * to_stride + v, sum);
      }
    }
  }
};

}  // namespace check
