// SPDX-License-Identifier: Apache-2.0
#include "torch/diagnostics.h"

#include <utility>

#include "cpu/block_attention.h"
#include "cpu/isa.h"
#include "cpu/lm_head_confidence.h"
#include "cpu/soft_embedding.h"
#include "cpu/token_confidence.h"
#include "cpu/top_candidates.h"

namespace dlm::diagnostics {

std::map<std::string, std::string> build_info() {
  return {{"version", DLM_VERSION},
          {"torch_headers", DLM_TORCH_HEADERS},
          {"compiler", __VERSION__},
          {"cuda_architectures", DLM_CUDA_ARCHITECTURES},
          {"cuda_state", DLM_CUDA_STATE}};
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::isas()) names.push_back(cpu::isa_name(isa));
  return names;
}

std::string cpu_isa() { return cpu::isa_name(cpu::isa()); }
std::string cpu_isa_reason() { return cpu::isa_reason(); }
void set_cpu_isa(const std::string& name) { cpu::set_isa(name); }

std::map<std::string, std::map<std::string, std::string>> cpu_kernels() {
  using dlm::cpu::Isa;
  const auto generic = [](Isa) { return Isa::kGeneric; };
  const std::pair<const char*, Isa (*)(Isa)> ops[] = {
      {"block_attention", dlm::cpu::block_attention_isa},
      {"token_confidence", dlm::cpu::token_confidence_isa},
      {"select_tokens", generic},
      {"remask_", generic},
      {"verify_drafts", generic},
      {"splice_", generic},
      {"soft_embedding", dlm::cpu::soft_embedding_isa},
      {"top_candidates", dlm::cpu::top_candidates_isa},
      {"lm_head_confidence", dlm::cpu::lm_head_confidence_isa},
      {"lm_head_candidates", generic},
      {"shard_confidence", generic},
  };
  std::map<std::string, std::map<std::string, std::string>> kernels;
  for (const auto& [op, used_for] : ops) {
    for (int i = 0; i <= int(Isa::kAmx); ++i) {
      kernels[op][dlm::cpu::isa_name(Isa(i))] = dlm::cpu::isa_name(used_for(Isa(i)));
    }
  }
  return kernels;
}

}  // namespace dlm::diagnostics
