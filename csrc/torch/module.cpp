// SPDX-License-Identifier: Apache-2.0
// dlmkernels._C: importing it loads the library next to it, which registers torch.ops.dlmkernels.*.
// Its functions report what was built and what is in use. Everything that depends on the Python
// version is in this file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "torch/diagnostics.h"

namespace py = pybind11;
namespace diagnostics = dlm::diagnostics;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.dlmkernels when imported (after torch).";
  diagnostics::cpu_isa();  // an invalid DLMKERNELS_CPU_ISA fails here, not in the first op
  m.def("build_info", &diagnostics::build_info);
  m.def("cpu_isas", &diagnostics::cpu_isas);
  m.def("cpu_kernels", &diagnostics::cpu_kernels);
  m.def("cpu_isa", &diagnostics::cpu_isa);
  m.def("cpu_isa_reason", &diagnostics::cpu_isa_reason);
  m.def("set_cpu_isa", &diagnostics::set_cpu_isa, py::arg("name"));
}
