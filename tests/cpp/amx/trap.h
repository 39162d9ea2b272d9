// SPDX-License-Identifier: Apache-2.0
// Machine code with tile instructions on a processor without: each of them is an illegal
// instruction there, and the handler of that signal decodes it, does on the model (one a thread)
// what it would have done, and goes on behind it. So what is tested is what the compiler made, in
// memory that a sanitizer watches.
//
// On a processor with AMX nothing is trapped: the system is asked for the registers, and the same
// code runs for real.
#pragma once
#include <functional>
#include <string>

#include "amx/tile_model.h"

namespace amx {

bool on_processor();  // decided, and the trap set, by the first call

// What a program with a fault would do: one instruction missing, or with another operand.
enum class Slip {
  kNone,
  kNoConfiguration,
  kNoRelease,
  kNoZero,
  kNoStore,
  kNarrowConfiguration,  // eight rows
  kStridedLoad,          // one row of 64 bytes too far apart, into tile 5
  kUnstridedStore,       // rows of sums on top of one another
  kSwappedOperands,
  kSumsMixed,  // tile 2 for tile 0
};

// Runs `body`, with what the model found wrong, or "". Ends at the first wrong instruction. The
// tiles must not stay configured.
std::string run(const std::function<void()>& body, Slip slip = Slip::kNone);
int64_t products();  // of tiles, in this thread since the last run began

}  // namespace amx
