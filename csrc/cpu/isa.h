// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: chosen once, from what was compiled and what the
// processor has. An op without kernels of its own for a set uses those of the next lower one: see
// ForIsa.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace dlm::cpu {

// Ascending: a later one is preferred.
enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);
Isa isa();                 // in use: the best available, or DLMKERNELS_CPU_ISA
std::vector<Isa> isas();   // available on this machine in this build
std::string isa_reason();  // why this one and no better one
// Throws std::invalid_argument, with what is available and why no other, when `name` is not, or the
// system refuses its registers.
void set_isa(const std::string& name);

// An op's kernels for one instruction set. Its table begins with the generic ones and ascends; an
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
