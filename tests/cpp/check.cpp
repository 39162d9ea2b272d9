// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "golden.h"
#ifdef DLM_SIMT
#include "must_fail.h"
#include "simt/fiber.h"
#endif

#ifdef DLM_SIMT
// One report is enough, and its exit status tells it from a failed check.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1:exitcode=66:report_thread_leaks=0";
}
extern "C" const char* __asan_default_options() { return "exitcode=67:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
#endif

namespace check {
namespace {

struct Test {
  std::string name, file;
  void (*run)();
};
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
std::string context;  // the schedule under which the test runs
int passes, failures;

std::string stem(const char* file) {
  std::string s = file;
  if (auto slash = s.rfind('/'); slash != s.npos) s = s.substr(slash + 1);
  return s.substr(0, s.find('.'));
}

}  // namespace

Register::Register(const char* name, const char* file, void (*test)()) {
  tests().push_back({name, stem(file), test});
}

void fail(const char* file, int line, const char* format, ...) {
  if (++failures > 8) return;
  printf("  %s:%d: ", file, line);
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("%s\n", context.c_str());
}
void passed() { ++passes; }
bool failed() { return failures > 0; }

#ifdef DLM_SIMT
void for_each_schedule(const std::function<void()>& body) {
  simt::Options& o = simt::options();
  const simt::Options before = o;
  const bool chosen =
      getenv("SIMT_SCHED") || getenv("SIMT_ASYNC") || getenv("SIMT_SEED") || getenv("SIMT_BLOCKS");
  // Races, overruns and wrong translations show under any schedule; each and each landing once are
  // enough there. Every pair of them runs in the plain build of the source, the quickest.
  const bool all = !simt::under_asan() && !simt::under_tsan() && !simt::translated_ptx();
  const char* schedules[] = {"in_order", "random", "pct"};
  const char* landings[] = {"lazy", "eager", "random"};
  for (int turn = 0; turn < (chosen ? 1 : all ? 9 : 3) && !failed(); ++turn) {
    if (!chosen) {
      const int schedule = turn % 3, landing = (turn + turn / 3) % 3;
      o.schedule = simt::Schedule(schedule);
      o.landing = simt::Landing(landing);
      o.resident_blocks = schedule ? 3 : 1;
      o.seed = 1 + turn;
      context = std::string(" [SIMT_SCHED=") + schedules[schedule] +
                " SIMT_ASYNC=" + landings[landing] +
                " SIMT_BLOCKS=" + std::to_string(o.resident_blocks) +
                " SIMT_SEED=" + std::to_string(o.seed) + "]";
    }
    body();
  }
  o = before;
  context.clear();
}
#endif

// usage: [--list] [--fault NAME] [--dump-golden FOLDER DEVICE] [NAME...], a NAME being a test's or
// a file's
int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (auto& test : tests()) printf("%s %s\n", test.file.c_str(), test.name.c_str());
      return 0;
    }
#ifdef DLM_SIMT
    if (argument == "--fault" && i + 1 < argc) return run_fault(argv[i + 1]);
#endif
    if (argument == "--dump-golden" && i + 2 < argc) {
      golden::dump_to(argv[i + 1], argv[i + 2]);
      i += 2;
      continue;
    }
    wanted.push_back(argument);
  }
#ifndef DLM_SIMT
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) {
    printf("no CUDA device: these tests need a GPU\n");
    return 77;
  }
#endif
  int ran = 0, bad = 0;
  for (auto& test : tests()) {
    bool take = wanted.empty();
    for (auto& name : wanted) take |= name == test.name || name == test.file;
    if (!take) continue;
    passes = failures = 0;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
    } catch (const std::exception& e) {
      fail(test.file.c_str(), 0, "%s", e.what());
    }
    context.clear();
    if (passes + failures == 0) fail(test.file.c_str(), 0, "the test checks nothing");
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%s %s.%s: %d checks, %.2f s\n", failures ? "FAIL" : "PASS", test.file.c_str(),
           test.name.c_str(), passes + failures, seconds);
    ++ran;
    bad += failures > 0;
  }
  printf("%d tests, %d failed\n", ran, bad);
  return bad || !ran;
}

}  // namespace check

int main(int argc, char** argv) { return check::main(argc, argv); }
