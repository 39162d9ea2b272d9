// SPDX-License-Identifier: Apache-2.0
#include "must_fail.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "simt/fiber.h"

namespace check {
namespace {

std::vector<Planted>& all_faults() {
  static std::vector<Planted> all;
  return all;
}

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

const char* expected(const Planted& fault) {
  if (simt::translated_ptx() && *fault.ptx) return fault.ptx;
  return simt::under_tsan() ? fault.tsan : simt::under_asan() ? fault.asan : fault.plain;
}

// Without the sources' lines, which take longer to find than the race: `--fault NAME` prints them.
FILE* start(const std::string& self, const char* name) {
  const std::string command = "TSAN_OPTIONS=symbolize=0 '" + self + "' --fault " + name + " 2>&1";
  return popen(command.c_str(), "r");
}

std::string output_of(FILE* child) {
  std::string output;
  char buffer[4096];
  while (size_t n = fread(buffer, 1, sizeof buffer, child)) output.append(buffer, n);
  pclose(child);
  return output;
}

}  // namespace

FaultTable::FaultTable(std::initializer_list<Planted> faults) : faults_(faults) {
  all_faults().insert(all_faults().end(), faults.begin(), faults.end());
}

void FaultTable::check() const {
  const std::string self = self_path();
  CHECK(!self.empty(), "/proc/self/exe is not readable");
  constexpr size_t kTogether = 2;
  std::vector<FILE*> children(faults_.size());
  const auto start_if_any = [&](size_t i) {
    if (i < faults_.size()) children[i] = start(self, faults_[i].name);
  };
  for (size_t i = 0; i < kTogether; ++i) start_if_any(i);
  for (size_t i = 0; i < faults_.size(); ++i) {
    const std::string output = output_of(children[i]);
    start_if_any(i + kTogether);
    CHECK(allows(expected(faults_[i]), kind(output)), "%s: noticed by %s, expected %s:\n%.600s",
          faults_[i].name, kind(output), expected(faults_[i]), output.c_str());
  }
}

int run_fault(const char* name) {
  for (const Planted& fault : all_faults()) {
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
