// SPDX-License-Identifier: Apache-2.0
// The instruction set that the CPU kernels use. It is chosen once, from what was compiled and what
// the processor supports. An op without kernels for a set uses those of the next lower one: see
// ForIsa.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace dlm::cpu {

// In ascending order of preference.
enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);
Isa isa();                 // in use: the best available one, or DLMKERNELS_CPU_ISA
std::vector<Isa> isas();   // available on this machine in this build
std::string isa_reason();  // why it was chosen instead of a better one
// Throws std::invalid_argument if `name` is not available, or if the system does not permit its
// registers; the message lists what is available and why the others are not.
void set_isa(const std::string& name);

// An op's kernels for one instruction set. Tables start with the generic ones and ascend; an
// instruction set without an entry uses that of the next lower one.
template <class Kernels>
struct ForIsa {
  Isa isa;
  Kernels kernels;
};
template <class Kernels, size_t n>
const ForIsa<Kernels>& best_for(Isa isa, const ForIsa<Kernels> (&table)[n]) {
  size_t best = 0;
  for (size_t i = 1; i < n; ++i) {
    if (table[i].isa <= isa) best = i;
  }
  return table[best];
}

}  // namespace dlm::cpu
