// SPDX-License-Identifier: Apache-2.0
// dlmkernels._C: importing it registers torch.ops.dlmkernels.*; its functions tell what was built
// and what is in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

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
  m.def("cpu_isa", [] { return dlm::cpu::isa_name(dlm::cpu::isa()); });
  m.def("cpu_isa_reason", &dlm::cpu::isa_reason);
  m.def("set_cpu_isa", &dlm::cpu::set_isa, py::arg("name"));
}
