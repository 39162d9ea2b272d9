// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace check {
int run_fault(
    const char* name);  // runs one faulty kernel of must_fail.cpp and says what was noticed
}
