// SPDX-License-Identifier: Apache-2.0
// The tester tested: kernels with one planted fault each, and what must notice it in which build.
// must_fail/<op>.cpp holds an op's table.
#pragma once
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"

namespace check {

// What notices: "value" a wrong result, "simt" the machine, "asan", "ubsan", "race"
// ThreadSanitizer, "crash" a signal, "-" nothing; "a|b" either; "?": undefined, since what lies
// behind an allocation is.
struct Planted {
  const char* name;
  std::string (*run)();  // what is wrong with the results, or ""
  const char *plain, *asan, *tsan;
  // What notices it when the kernel is nvcc's PTX, in every build; "": as before. Overruns from one
  // array into the next differ: nvcc has folded the offsets, so there is no fence between them. Of
  // the ops, only what the library holds is translated.
  const char* ptx;
};
constexpr char kNotRun[] = "nothing: it did not run";

// The faults of one kernel. They run in child processes, since a sanitizer's report ends the
// process; all tables of a program are known to run_fault, so names begin with the kernel's.
class FaultTable {
 public:
  FaultTable(std::initializer_list<Planted> faults);
  void check() const;

 private:
  std::vector<Planted> faults_;
};

int run_fault(const char* name);  // runs one faulty kernel and says what was noticed

}  // namespace check
