// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: chosen once, from what was compiled and what the processor has.
#pragma once
#include <string>

namespace dlm::cpu {

enum class Isa : int { kGeneric, kAvx512 };  // ascending: a later one is preferred

const char* isa_name(Isa isa);
Isa isa();                 // in use: the best available, or DLMKERNELS_CPU_ISA
void set_isa(const std::string& name);  // throws std::invalid_argument when unknown or not available
std::string isa_reason();  // why this one and no better one

}  // namespace dlm::cpu
