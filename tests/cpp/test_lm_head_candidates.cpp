// SPDX-License-Identifier: Apache-2.0
// lm_head_candidates on the cases of top_candidates: hidden states pick columns of the weights,
// which are the cases' logits.
#include "cuda/lm_head_candidates.cuh"
#include "kernels/candidates_case.h"
#ifdef DLM_SIMT
#include "simt/fiber.h"
#endif

using namespace check;
using C = CandidatesCase;

namespace {

constexpr dlm::DType kTypes[] = {dlm::DType::kBFloat16, dlm::DType::kFloat16, dlm::DType::kFloat32};

// ThreadSanitizer is slow, and looks for what does not depend on the numbers.
bool skipped(uint64_t seed) {
#ifdef DLM_SIMT
  return simt::under_tsan() && seed % 4;
#else
  (void)seed;
  return false;
#endif
}

// A case whose row r of logits is column r of the weights: hidden state r is 1 there, and 0
// elsewhere.
struct PickedLogits {
  C c;
  dlm::LmHeadCandidatesParams p{};
  Array<uint8_t> hidden, weight, workspace;

  PickedLogits(dlm::DType dtype, int64_t N, int64_t V, int64_t k, unsigned with, uint64_t seed)
      : c(dtype, N, V, k, with, seed) {
    const int64_t size = dlm::element_size(dtype), R = c.p.rows.R, D = R + int64_t(seed % 9);
    p.head.rows = c.p.rows;
    p.head.D = p.head.hidden_stride = D, p.head.weight_stride = D + int64_t(seed % 3);
    hidden = Array<uint8_t>(size_t(size * R * D));
    weight = Array<uint8_t>(size_t(size * V * p.head.weight_stride));
    const float one = 1;
    const auto half = dlm::from_float<dlm::Float16>(one);
    const auto bfloat = dlm::from_float<dlm::BFloat16>(one);
    const void* const unit = dtype == dlm::DType::kFloat32   ? static_cast<const void*>(&one)
                             : dtype == dlm::DType::kFloat16 ? static_cast<const void*>(&half)
                                                             : &bfloat;
    const auto* logits = static_cast<const uint8_t*>(c.p.rows.logits);
    for (int64_t r = 0; r < R; ++r) {
      memcpy(&hidden[size_t(size * (r * D + r))], unit, size_t(size));
      for (int64_t v = 0; v < V; ++v) {
        memcpy(&weight[size_t(size * (v * p.head.weight_stride + r))],
               logits + size * (r * c.p.rows.logits_stride + v), size_t(size));
      }
    }
    p.head.rows.logits = nullptr, p.head.rows.logits_stride = 0;
    p.head.hidden = hidden.data(), p.head.weight = weight.data();
    p.k = k, p.ids = c.p.ids, p.values = c.p.values, p.logsumexp = c.p.logsumexp;
    workspace = Array<uint8_t>(size_t(dlm::cuda::head_candidates_workspace(p)), 0xff);
  }
  std::string wrong() {
    run(dlm::cuda::start_lm_head_candidates(p, workspace.data(), nullptr));
    return c.wrong();
  }
};

void check_case(dlm::DType dtype, int64_t N, int64_t V, int64_t k, unsigned with, uint64_t seed) {
  if (skipped(seed)) return;
  PickedLogits picked(dtype, N, V, k, with, seed);
  const std::string wrong = picked.wrong();
  CHECK(wrong.empty(), "seed %d, %d rows, V %d, k %d: %s", int(seed), int(N), int(V), int(k),
        wrong.c_str());
}

}  // namespace

TEST(every_shape) {
  uint64_t seed = 0;
  for (const dlm::DType dtype : kTypes) {
    for (const int64_t V : {1, 5, 255, 256, 257, 700, 3000}) {
      for (const int64_t k : {1, 16, 64}) {
        ++seed;
        const unsigned kinds[] = {0u, C::kTies | 0u, C::kMap | C::kBanned | C::kWild | 0u,
                                  C::kBitmask | C::kCrowded | 0u};
        check_case(dtype, 3, V, k, kinds[seed % 4], seed);
      }
    }
  }
}

// More rows than a tile has, and than 8 MB hold the logits of.
TEST(many_rows) {
  check_case(dlm::DType::kBFloat16, 33, 600, 7, C::kMap | 0u, 1000);
  check_case(dlm::DType::kFloat32, 33, 300, 7, 0u, 1004);
  check_case(dlm::DType::kFloat16, 140, 270, 3, 0u, 1008);
  dlm::LmHeadCandidatesParams p{};
  p.head.rows.dtype = dlm::DType::kBFloat16, p.head.rows.N = 10000, p.head.rows.V = 262144;
  CHECK(dlm::cuda::head_candidates_workspace(p) <= 8'000'000, "%lld bytes",
        (long long)dlm::cuda::head_candidates_workspace(p));
  const int64_t group = dlm::cuda::head_group(p.head, true);
  CHECK(group == 14, "%d rows", int(group));
  p.head.rows.N = 16, p.head.rows.V = 300000;
  CHECK(dlm::cuda::head_group(p.head, true) == 8, "groups of the case below");
  check_case(dlm::DType::kBFloat16, 16, 300000, 7, C::kMap | 0u, 1001);
}

TEST(under_every_schedule) {
  for_each_schedule([] {
    check_case(dlm::DType::kBFloat16, 3, 900, 20, C::kMap | 0u, 2000);
    check_case(dlm::DType::kFloat32, 2, 400, 64, C::kTies | 0u, 2004);
  });
}
