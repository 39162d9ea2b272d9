// SPDX-License-Identifier: Apache-2.0
// The tester tested: kernels with one planted fault each, and what must notice it in which build.
// Each runs in a child process, since a sanitizer's report ends the process.
#include "must_fail.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "kernels/attention_case.h"
#include "kernels/carriers.h"
#include "kernels/confidence_case.h"
#include "kernels/remask_case.h"
#include "kernels/select_case.h"
#include "kernels/soft_case.h"
#include "kernels/splice_case.h"
#include "kernels/verify_case.h"
#include "simt/fiber.h"

namespace check {
namespace {

using Row = dlm::cuda::RowFault;
using Tile = dlm::cuda::TileFault;
using Attention = dlm::cuda::AttentionFault;
using Select = dlm::cuda::SelectFault;
using Remask = dlm::cuda::RemaskFault;
using Confidence = dlm::cuda::ConfidenceFault;
using Soft = dlm::cuda::SoftFault;
using Splice = dlm::cuda::SpliceFault;
using Verify = dlm::cuda::VerifyFault;

template <Row fault>
std::string row() {
  RowCase c(2, 603, 3, 7);  // the shares leave the second warp without work
  dlm::cuda::row_reduce<fault>(c.params(), c.rows, nullptr);
  return c.wrong();
}
template <Tile fault>
std::string tile() {
  TileCase c(63, 28, 104, 5);
  dlm::cuda::tile_product<fault>(c.params(), nullptr);
  return c.wrong();
}

// What notices: "value" a wrong result, "simt" the machine, "asan", "race" ThreadSanitizer,
// "crash" a signal, "-" nothing; "a|b" either; "?": undefined, since what lies behind an allocation
// is.
// In the last column, what notices it when the kernel is nvcc's PTX, in every build; "": as before.
// Overruns from one array into the next differ: nvcc has folded the offsets, so there is no fence
// between the arrays.
// Of the ops, only what the library holds is translated.
constexpr char kNotRun[] = "nothing: it did not run";
struct Fault {
  const char* name;
  std::string (*run)();
  const char *plain, *asan, *tsan, *ptx;
};
const Fault kFaults[] = {
    // clang-format off
    // name, kernel, and what notices it: plain, asan, tsan, ptx
    {"row_none", row<Row::kNone>, "-", "-", "-", ""},
    {"row_missing_barrier", row<Row::kMissingBarrier>, "value", "value", "race", ""},
    {"row_overread", row<Row::kOverread>, "?", "asan", "?", ""},
    {"row_smem_overrun", row<Row::kSmemOverrun>, "value", "asan", "value", "value"},
    {"row_unmasked_tail", row<Row::kUnmaskedTail>, "value", "value", "value", ""},
    {"row_wrong_splits", row<Row::kWrongSplits>, "value", "value", "race", ""},
    {"row_relaxed_counter", row<Row::kRelaxedCounter>, "-", "-", "race", ""},
    {"row_divergent_shuffle", row<Row::kDivergentShuffle>, "simt", "simt", "simt", ""},
    {"row_early_exit", row<Row::kEarlyExit>, "simt", "simt", "simt", ""},
    {"row_wrong_mask", row<Row::kWrongMask>, "simt", "simt", "simt", ""},
    {"tile_none", tile<Tile::kNone>, "-", "-", "-", ""},
    {"tile_no_barrier_after_wait", tile<Tile::kNoBarrierAfterWait>, "value", "value", "race", ""},
    {"tile_no_barrier_at_end", tile<Tile::kNoBarrierBeforeReuse>, "value", "value", "race", ""},
    {"tile_lax_wait", tile<Tile::kLaxWait>, "value", "value", "value", ""},
    {"tile_swapped_registers", tile<Tile::kSwappedRegisters>, "value", "value", "value", ""},
    {"tile_overread", tile<Tile::kOverread>, "?", "asan", "?", ""},
    {"tile_smem_overrun", tile<Tile::kSmemOverrun>, "value", "asan", "race", "value"},
    {"tile_unmasked_tail", tile<Tile::kUnmaskedTail>, "value", "value", "value", ""},
    {"tile_missing_syncwarp", tile<Tile::kMissingSyncwarp>, "value", "value", "race", ""},
    {"tile_divergent_barrier", tile<Tile::kDivergentBarrier>, "simt", "simt", "simt", ""},
    {"attention_none", try_attention<Attention::kNone>, "-", "-", "-", ""},
    {"attention_no_barrier_before_reuse", try_attention<Attention::kNoBarrierBeforeReuse>, "value", "value", "race", kNotRun},
    {"attention_lax_wait", try_attention<Attention::kLaxWait>, "value", "value", "value", kNotRun},
    {"attention_tail_unmasked", try_attention<Attention::kTailUnmasked>, "value", "value", "value", kNotRun},
    {"attention_splits_overlap", try_attention<Attention::kSplitsOverlap>, "value", "value", "value", kNotRun},
    {"attention_not_rescaled", try_attention<Attention::kNotRescaled>, "value", "value", "value", kNotRun},
    {"attention_zero_times_nan", try_attention<Attention::kZeroTimesNaN>, "value", "value", "value", kNotRun},
    {"attention_merged_too_early", try_attention<Attention::kMergedTooEarly>, "value", "value", "race", kNotRun},
    {"attention_maxima_mixed", try_attention<Attention::kMaximaMixed>, "value", "value", "value", kNotRun},
    {"attention_first_row_wins", try_attention<Attention::kFirstRowWins>, "value", "value", "value", kNotRun},
    {"select_none", try_select<Select::kNone>, "-", "-", "-", ""},
    {"select_sort_reads_too_early", try_select<Select::kSortReadsTooEarly>, "value", "value", "race", kNotRun},
    {"select_sort_writes_too_early", try_select<Select::kSortWritesTooEarly>, "value", "value", "race", kNotRun},
    {"select_sort_stops_early", try_select<Select::kSortStopsEarly>, "value", "value", "value", kNotRun},
    {"select_limit_read_too_early", try_select<Select::kLimitReadTooEarly>, "value", "value", "race", kNotRun},
    {"select_totals_read_too_early", try_select<Select::kTotalsReadTooEarly>, "value", "value", "race", kNotRun},
    {"select_unmasked_tail", try_select<Select::kUnmaskedTail>, "value", "asan", "value", kNotRun},
    {"select_high_slot_wins_ties", try_select<Select::kHighSlotWinsTies>, "value", "value", "value", kNotRun},
    {"select_rank_off_by_one", try_select<Select::kRankOffByOne>, "value", "value", "value", kNotRun},
    {"select_fill_within_gate", try_select<Select::kFillWithinGate>, "value", "value", "value", kNotRun},
    {"select_sums_within_warp", try_select<Select::kSumsWithinWarp>, "value", "value", "value", kNotRun},
    {"remask_none", try_remask<Remask::kNone>, "-", "-", "-", ""},
    {"remask_searches_too_early", try_remask<Remask::kSearchesTooEarly>, "value", "value", "race", kNotRun},
    {"remask_partials_read_too_early", try_remask<Remask::kPartialsReadTooEarly>, "simt", "simt", "race", kNotRun},
    {"remask_fills_too_early", try_remask<Remask::kFillsTooEarly>, "value", "value", "race", kNotRun},
    {"remask_last_slot_wins", try_remask<Remask::kLastSlotWins>, "value", "value", "value", kNotRun},
    {"remask_trusts_positions", try_remask<Remask::kTrustsPositions>, "crash", "asan", "crash", kNotRun},
    {"remask_skips_sort", try_remask<Remask::kSkipsSort>, "value", "value", "race", kNotRun},
    {"remask_odd_tail", try_remask<Remask::kOddTail>, "value", "asan", "value", kNotRun},
    {"remask_keeps_overfilled", try_remask<Remask::kKeepsOverfilled>, "value", "value", "value", kNotRun},
    {"remask_no_origin", try_remask<Remask::kNoOrigin>, "value", "value", "value", kNotRun},
    {"remask_ends_before_given", try_remask<Remask::kEndsBeforeGiven>, "value", "value", "value", kNotRun},
    {"remask_no_end", try_remask<Remask::kNoEnd>, "value", "value", "value", kNotRun},
    {"remask_keeps_records", try_remask<Remask::kKeepsRecords>, "value", "value", "value", kNotRun},
    {"confidence_none", try_confidence<Confidence::kNone>, "-", "-", "-", ""},
    {"confidence_maximum_read_too_early", try_confidence<Confidence::kMaximumReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_parts_read_too_early", try_confidence<Confidence::kPartsReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_lax_wait", try_confidence<Confidence::kLaxWait>, "value", "value", "value", kNotRun},
    {"confidence_moves_too_early", try_confidence<Confidence::kMovesTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_loads_one_off", try_confidence<Confidence::kLoadsOneOff>, "simt", "ubsan", "simt", kNotRun},
    {"confidence_overread", try_confidence<Confidence::kOverread>, "value", "asan", "value", kNotRun},
    {"confidence_unmasked_tail", try_confidence<Confidence::kUnmaskedTail>, "value", "asan", "value", kNotRun},
    {"confidence_divergent_shuffle", try_confidence<Confidence::kDivergentShuffle>, "simt", "simt", "simt", kNotRun},
    {"confidence_high_id_wins_ties", try_confidence<Confidence::kHighIdWinsTies>, "value", "value", "value", kNotRun},
    {"confidence_maximum_stays", try_confidence<Confidence::kMaximumStays>, "value", "value", "value", kNotRun},
    {"confidence_bound_too_high", try_confidence<Confidence::kBoundTooHigh>, "value", "value", "value", kNotRun},
    {"confidence_wrong_tiles", try_confidence<Confidence::kWrongTiles>, "value", "value", "value", kNotRun},
    {"confidence_bins_read_too_early", try_confidence<Confidence::kBinsReadTooEarly>, "value", "value", "race", kNotRun},
    {"confidence_limit_off_by_one", try_confidence<Confidence::kLimitOffByOne>, "value", "value", "value", kNotRun},
    {"verify_none", try_verify<Verify::kNone>, "-", "-", "-", ""},
    {"verify_accepted_read_too_early", try_verify<Verify::kAcceptedReadTooEarly>, "crash", "asan", "crash", kNotRun},
    {"verify_best_read_too_early", try_verify<Verify::kBestReadTooEarly>, "value", "value", "race", kNotRun},
    {"verify_counts_beyond_failure", try_verify<Verify::kCountsBeyondFailure>, "value", "value", "value", kNotRun},
    {"verify_no_leniency", try_verify<Verify::kNoLeniency>, "value", "value", "value", kNotRun},
    {"verify_bound_too_low", try_verify<Verify::kBoundTooLow>, "value", "value", "value", kNotRun},
    {"verify_trusts_drafts", try_verify<Verify::kTrustsDrafts>, "crash", "asan", "crash", kNotRun},
    {"splice_none", try_splice<Splice::kNone>, "-", "-", "-", ""},
    {"splice_totals_read_too_early", try_splice<Splice::kTotalsReadTooEarly>, "simt", "simt", "race", kNotRun},
    {"splice_moves_too_early", try_splice<Splice::kMovesTooEarly>, "value", "value", "race", kNotRun},
    {"splice_always_from_the_left", try_splice<Splice::kAlwaysFromTheLeft>, "value", "value", "race", kNotRun},
    {"splice_keeps_overfilled", try_splice<Splice::kKeepsOverfilled>, "value", "value", "race", kNotRun},
    {"splice_removes_frozen", try_splice<Splice::kRemovesFrozen>, "value", "value", "value", kNotRun},
    {"splice_dirty_travels", try_splice<Splice::kDirtyTravels>, "value", "value", "value", kNotRun},
    {"splice_trusts_lengths", try_splice<Splice::kTrustsLengths>, "value", "asan", "value", kNotRun},
    {"soft_none", try_soft<Soft::kNone>, "-", "-", "-", ""},
    {"soft_lax_wait", try_soft<Soft::kLaxWait>, "value", "value", "value", kNotRun},
    {"soft_no_barrier", try_soft<Soft::kNoBarrier>, "value", "value", "race", kNotRun},
    {"soft_overread", try_soft<Soft::kOverread>, "?", "asan", "?", kNotRun},
    {"soft_unmasked_tail", try_soft<Soft::kUnmaskedTail>, "value", "value", "value", kNotRun},
    {"soft_splits_overlap", try_soft<Soft::kSplitsOverlap>, "value", "value", "value", kNotRun},
    {"soft_sums_once", try_soft<Soft::kSumsOnce>, "value", "value", "value", kNotRun},
    {"soft_swapped_registers", try_soft<Soft::kSwappedRegisters>, "value", "value", "value", kNotRun},
    {"soft_hits_read_too_early", try_soft<Soft::kHitsReadTooEarly>, "value|crash", "asan", "race", kNotRun},
    // clang-format on
};

std::string self_path() {
  char path[4096] = {};
  return readlink("/proc/self/exe", path, sizeof path - 1) > 0 ? path : "";
}
const char* kind(const std::string& output) {
  if (output.find("not among the translated kernels") != output.npos) return kNotRun;
  if (output.find("ThreadSanitizer: data race") != output.npos) return "race";
  if (output.find("ERROR: AddressSanitizer") != output.npos) return "asan";
  if (output.find("runtime error:") != output.npos) return "ubsan";
  if (output.find("simt: ") == 0) return "simt";
  if (output.find("value: ") == 0) return "value";
  return output.find("nothing noticed") == 0 ? "-" : "crash";
}

bool allows(const char* want, const std::string& kind) {
  const std::string list = "|" + std::string(want) + "|";
  return !strcmp(want, "?") || list.find("|" + kind + "|") != list.npos;
}

}  // namespace

int run_fault(const char* name) {
  for (auto& fault : kFaults) {
    if (strcmp(fault.name, name)) continue;
    simt::Options& o = simt::options();
    try {
      const bool faultless = strstr(name, "_none");  // run under every schedule elsewhere
      for (int turn = 0; turn < (faultless ? 3 : 9); ++turn) {
        o.schedule = simt::Schedule((turn + 2) % 3);  // pct first: one warp runs ahead
        o.landing = simt::Landing(turn / 3);
        o.resident_blocks = turn % 2 ? 1 : 3;
        o.seed = uint64_t(turn + 1);
        const std::string wrong = fault.run();
        if (!wrong.empty()) {
          printf("value: %s\n", wrong.c_str());
          return 1;
        }
      }
    } catch (const simt::Error& e) {
      printf("simt: %s\n", e.what());
      fflush(stdout);
      _exit(1);  // abandoned threads are not worth a leak report
    }
    printf("nothing noticed\n");
    return 0;
  }
  fprintf(stderr, "no fault %s\n", name);
  return 2;
}

}  // namespace check

using namespace check;

TEST(planted_faults_are_noticed) {
  const std::string self = self_path();
  CHECK(!self.empty(), "/proc/self/exe is not readable");
  // Some at a time, and without the sources' lines, which take longer to find than the race:
  // `--fault NAME` prints them.
  constexpr size_t kTogether = 4, kCount = sizeof kFaults / sizeof *kFaults;
  FILE* children[kCount];
  auto start = [&](size_t i) {
    const std::string command =
        "TSAN_OPTIONS=symbolize=0 '" + self + "' --fault " + kFaults[i].name + " 2>&1";
    children[i] = popen(command.c_str(), "r");
  };
  for (size_t i = 0; i < kTogether; ++i) start(i);
  for (size_t i = 0; i < kCount; ++i) {
    std::string output;
    char buffer[4096];
    while (size_t n = fread(buffer, 1, sizeof buffer, children[i])) output.append(buffer, n);
    pclose(children[i]);
    if (i + kTogether < kCount) start(i + kTogether);
    const Fault& fault = kFaults[i];
    const char* want = simt::under_tsan()   ? fault.tsan
                       : simt::under_asan() ? fault.asan
                                            : fault.plain;
    if (simt::translated_ptx() && *fault.ptx) want = fault.ptx;
    CHECK(allows(want, kind(output)), "%s: noticed by %s, expected %s:\n%.600s", fault.name,
          kind(output), want, output.c_str());
  }
}
