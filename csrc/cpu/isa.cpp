// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#ifdef DLM_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlm::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

#ifdef DLM_AMX
// State component of the tile registers' data. A process has to request it from Linux (since 5.16,
// see Documentation/arch/x86/xstate.rst). The permission applies to the whole process.
constexpr int kTileData = 18, kGetSupported = 0x1021, kRequestPermission = 0x1023;

bool processor_has(int bit) {  // CPUID leaf 7, EDX
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> bit & 1;
}
bool system_has_tiles() {
  uint64_t components = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &components) == 0 && components >> kTileData & 1;
}
bool may_use_tiles() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }
#endif

// Returns why an instruction set cannot be used here; empty if it can.
std::string obstacle(Isa isa) {
  if (isa == Isa::kGeneric) return "";
#ifdef DLM_X86
#ifndef DLM_AMX
  if (isa == Isa::kAmx) return "not in this build: the compiler or system lacks support for it";
#endif
  // These functions check CPUID for the instructions and XCR0 for the operating system's support of
  // their registers. The sets match the flags with which CMakeLists.txt compiles *_avx2.cpp and
  // *_avx512.cpp: every processor with AVX2 since 2013 has those three, every one with AVX-512
  // since 2017 those four.
  const char* missing = nullptr;
  if (isa == Isa::kAvx2) {
    if (!__builtin_cpu_supports("avx2"))
      missing = "AVX2";
    else if (!__builtin_cpu_supports("fma"))
      missing = "FMA";
    else if (!__builtin_cpu_supports("f16c"))
      missing = "F16C";
  } else if (!__builtin_cpu_supports("avx512f"))
    missing = "AVX-512F";
  else if (!__builtin_cpu_supports("avx512bw"))
    missing = "AVX-512BW";
  else if (!__builtin_cpu_supports("avx512dq"))
    missing = "AVX-512DQ";
  else if (!__builtin_cpu_supports("avx512vl"))
    missing = "AVX-512VL";
  else if (isa != Isa::kAvx512 && !__builtin_cpu_supports("avx512bf16"))
    missing = "AVX512_BF16";
#ifdef DLM_AMX
  else if (isa == Isa::kAmx && !processor_has(24))
    missing = "AMX-TILE";
  else if (isa == Isa::kAmx && !processor_has(22))
    missing = "AMX-BF16";
  else if (isa == Isa::kAmx && !system_has_tiles())
    return "the operating system does not support tile registers";
#endif
  // Measured: AMD processors multiply pairs of bf16 at twice the rate of floats, Intel's at half of
  // it.
  else if (isa == Isa::kAvx512Bf16 && __builtin_cpu_is("intel"))
    return "no faster than avx512 on Intel processors";
  return missing ? std::string("this processor or operating system lacks ") + missing : "";
#else
  return "not in this build, which is for a different processor architecture";
#endif
}

std::string available() {
  std::string can, cannot;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    const std::string reason = obstacle(Isa(i));
    if (reason.empty())
      can += std::string(can.empty() ? "" : ", ") + kNames[i];
    else
      cannot += std::string("; ") + kNames[i] + ": " + reason;
  }
  return "available: " + can + cannot;
}

// Requests the permission that an instruction set needs. Only call this for the set that will be
// used: the permission cannot be withdrawn.
bool permitted([[maybe_unused]] Isa isa) {
#ifdef DLM_AMX
  if (isa == Isa::kAmx) return may_use_tiles();
#endif
  return true;
}
constexpr const char* kRefused = "the system does not let this process use the registers";

Isa preferred() {
  static const Isa best = [] {
    const std::vector<Isa> all = isas();
    size_t i = all.size() - 1;
    while (!permitted(all[i])) --i;
    return all[i];
  }();
  return best;
}

Isa named(const std::string& name) {
  for (const Isa isa : isas()) {
    if (name != isa_name(isa)) continue;
    if (permitted(isa)) return isa;
    throw std::invalid_argument("CPU instruction set '" + name + "' cannot be used: " + kRefused);
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' cannot be used; " + available());
}

constexpr const char* kVariable = "DLMKERNELS_CPU_ISA";

std::atomic<Isa>& slot() {
  static std::atomic<Isa> chosen = [] {
    const char* wanted = std::getenv(kVariable);
    if (!wanted || !*wanted) return preferred();
    try {
      return named(wanted);
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument(std::string(kVariable) + ": " + e.what());
    }
  }();
  return chosen;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

Isa isa() { return slot().load(std::memory_order_relaxed); }

std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (obstacle(Isa(i)).empty()) found.push_back(Isa(i));
  }
  return found;
}

void set_isa(const std::string& name) { slot().store(named(name), std::memory_order_relaxed); }

std::string isa_reason() {
  if (isa() != preferred()) return std::string("requested; ") + available();
  std::string reasons, last;
  for (int better = int(isa()) + 1; better < int(std::size(kNames)); ++better) {
    std::string why = obstacle(Isa(better));
    if (why.empty()) why = kRefused;
    if (why == last) continue;
    reasons += std::string(reasons.empty() ? "" : "; ") + kNames[better] + ": " + why;
    last = why;
  }
  return reasons;
}

}  // namespace dlm::cpu
