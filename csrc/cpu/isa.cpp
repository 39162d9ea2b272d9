// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dlm::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx512"};
constexpr int kCompiled = sizeof(kNames) / sizeof(kNames[0]);

Isa best() { return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512 : Isa::kGeneric; }

Isa named(const std::string& name) {
  for (int i = 0; i < kCompiled; ++i) {
    if (name == kNames[i]) return Isa(i);
  }
  std::string known;
  for (const char* n : kNames) known += std::string(known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("CPU instruction set '" + name + "' is not available here; available: " + known);
}

std::atomic<Isa>& slot() {
  static std::atomic<Isa> chosen = [] {
    const char* wanted = std::getenv("DLMKERNELS_CPU_ISA");
    return wanted && *wanted ? named(wanted) : best();
  }();
  return chosen;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }
Isa isa() { return slot().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { slot().store(named(name), std::memory_order_relaxed); }
std::string isa_reason() { return "this build has the portable kernels only"; }

}  // namespace dlm::cpu
