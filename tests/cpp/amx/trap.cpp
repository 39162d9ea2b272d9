// SPDX-License-Identifier: Apache-2.0
#include "amx/trap.h"

#include <cpuid.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace amx {
namespace {

struct Thread {
  TileModel tiles;
  Slip slip = Slip::kNone;
  int64_t products = 0;
  bool running = false;
  sigjmp_buf back;
  const char* wrong = nullptr;
};
thread_local Thread thread;

// --- decoding: VEX.128.0F38.W0, opcodes 49, 4B and 5C --------------------------------------------

struct Instruction {
  int opcode, prefix;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, vvvv;   // tiles, where they name tiles
  bool memory;         // rm is `address`
  const uint8_t* address;
  int64_t stride;
  const uint8_t* next;
};

bool decode(const uint8_t* at, const greg_t* registers, Instruction* out) {
  static constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                         REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                         REG_R12, REG_R13, REG_R14, REG_R15};
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) return false;
  const int high_index = at[1] & 0x40 ? 0 : 8, high_base = at[1] & 0x20 ? 0 : 8;
  out->vvvv = ~at[2] >> 3 & 15;
  out->prefix = at[2] & 3;
  out->opcode = at[3];
  const int mod = at[4] >> 6;
  out->reg = at[4] >> 3 & 7;
  out->rm = at[4] & 7;
  out->memory = mod != 3;
  out->next = at + 5;
  if (!out->memory) return true;

  int64_t address = 0;
  out->stride = 0;
  int base = out->rm;
  if (out->rm == 4) {
    const int sib = *out->next++, index = (sib >> 3 & 7) | high_index;
    base = sib & 7;
    if (index != 4) out->stride = int64_t(registers[kRegisters[index]]) << (sib >> 6);
  }
  const bool absolute = mod == 0 && base == 5;  // relative to the next instruction without a sib
  if (!absolute) address += registers[kRegisters[base | high_base]];
  if (mod == 1) {
    address += int8_t(*out->next++);
  } else if (mod == 2 || absolute) {
    int32_t displacement;
    memcpy(&displacement, out->next, 4);
    out->next += 4;
    address += displacement;
    if (absolute && out->rm == 5) address += int64_t(out->next);
  }
  out->address = reinterpret_cast<const uint8_t*>(address);
  return true;
}

// --- executing -----------------------------------------------------------------------------------

const char* configure(const void* from) {
  uint8_t bytes[64];
  memcpy(bytes, from, sizeof bytes);
  if (thread.slip == Slip::kNoConfiguration) return nullptr;
  if (thread.slip == Slip::kNarrowConfiguration) memset(bytes + 48, 8, TileModel::kTiles);
  return thread.tiles.load_config(bytes);
}

const char* execute(const Instruction& i) {
  TileModel& tiles = thread.tiles;
  const Slip slip = thread.slip;
  uint8_t* address = const_cast<uint8_t*>(i.address);
  if (i.opcode == 0x5c && i.prefix == 2 && !i.memory) {  // TDPBF16PS reg, rm, vvvv
    ++thread.products;
    const int sums = slip == Slip::kSumsMixed && i.reg == 0 ? 2 : i.reg;
    return slip == Slip::kSwappedOperands ? tiles.dot(sums, i.vvvv, i.rm)
                                          : tiles.dot(sums, i.rm, i.vvvv);
  }
  if (i.opcode == 0x4b && i.prefix == 3 && i.memory) {  // TILELOADD
    return tiles.load(i.reg, address,
                      slip == Slip::kStridedLoad && i.reg == 5 ? i.stride + 64 : i.stride);
  }
  if (i.opcode == 0x4b && i.prefix == 2 && i.memory) {  // TILESTORED
    if (slip == Slip::kNoStore) return nullptr;
    return tiles.store(i.reg, address, slip == Slip::kUnstridedStore ? 0 : i.stride);
  }
  if (i.opcode == 0x49 && i.prefix == 3 && !i.memory && i.rm == 0) {  // TILEZERO
    return slip == Slip::kNoZero ? nullptr : tiles.zero(i.reg);
  }
  if (i.opcode == 0x49 && i.prefix == 0 && i.memory && i.reg == 0) return configure(address);
  if (i.opcode == 0x49 && i.prefix == 0 && !i.memory && i.reg == 0 && i.rm == 0) {  // TILERELEASE
    return slip == Slip::kNoRelease ? nullptr : tiles.release();
  }
  return "an instruction that the model does not know";
}

void on_illegal_instruction(int number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  if (!decode(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers, &instruction)) {
    signal(number, SIG_DFL);  // not one of these: it happens again, and ends the program
    return;
  }
  if (const char* wrong = execute(instruction)) {
    thread.wrong = wrong;
    if (thread.running) siglongjmp(thread.back, 1);
    fprintf(stderr, "amx: %s\n", wrong);
    _exit(1);
  }
  registers[REG_RIP] = reinterpret_cast<greg_t>(instruction.next);
}

}  // namespace

bool on_processor() {
  static const bool has = [] {
    unsigned a, b, c, d;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // as in csrc/cpu/isa.cpp
    if (tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return true;
    struct sigaction action{};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
    return false;
  }();
  return has;
}

std::string run(const std::function<void()>& body, Slip slip) {
  on_processor();
  thread.tiles.release();
  thread.slip = slip;
  thread.products = 0;
  thread.wrong = nullptr;
  thread.running = true;
  if (sigsetjmp(thread.back, 1) == 0) body();
  thread.running = false;
  if (thread.wrong) return thread.wrong;
  return thread.tiles.configured() ? "the tiles are still configured" : "";
}

int64_t products() { return thread.products; }

}  // namespace amx
