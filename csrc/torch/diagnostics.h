// SPDX-License-Identifier: Apache-2.0
// What was built and what is in use: everything the library exports besides the registered ops.
#pragma once
#include <map>
#include <string>
#include <vector>

namespace dlm {
namespace diagnostics __attribute__((visibility("default"))) {

  // version, torch_headers, compiler, cuda_architectures, cuda_state
  std::map<std::string, std::string> build_info();
  std::vector<std::string> cpu_isas();  // available on this machine in this build, ascending
  std::string cpu_isa();                // in use; throws if DLMKERNELS_CPU_ISA is not one of them
  std::string cpu_isa_reason();         // why this one was chosen and not a better one
  void set_cpu_isa(const std::string& name);
  // Op -> instruction set in use -> instruction set whose kernels the op then runs.
  std::map<std::string, std::map<std::string, std::string>> cpu_kernels();

}  // namespace diagnostics
}  // namespace dlm
