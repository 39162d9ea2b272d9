// SPDX-License-Identifier: Apache-2.0
// dlmkernels._C: importing it registers torch.ops.dlmkernels.*; its functions tell what was built
// and what is in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/block_attention.h"
#include "cpu/isa.h"
#include "cpu/lm_head_confidence.h"
#include "cpu/soft_embedding.h"
#include "cpu/token_confidence.h"
#include "cpu/top_candidates.h"

namespace py = pybind11;

namespace {

// Op -> instruction set -> that of the kernels which are used where it is in use.
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.dlmkernels when imported (after torch).";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = DLM_VERSION;
    info["torch_headers"] = DLM_TORCH_HEADERS;
    info["compiler"] = __VERSION__;
    info["cuda_architectures"] = DLM_CUDA_ARCHITECTURES;
    info["cuda_state"] = DLM_CUDA_STATE;
    return info;
  });
  dlm::cpu::isa();  // a wrong DLMKERNELS_CPU_ISA fails here, not in the first op
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const dlm::cpu::Isa isa : dlm::cpu::isas()) names.push_back(dlm::cpu::isa_name(isa));
    return names;
  });
  m.def("cpu_kernels", &cpu_kernels);
  m.def("cpu_isa", [] { return dlm::cpu::isa_name(dlm::cpu::isa()); });
  m.def("cpu_isa_reason", &dlm::cpu::isa_reason);
  m.def("set_cpu_isa", &dlm::cpu::set_isa, py::arg("name"));
}
