// SPDX-License-Identifier: Apache-2.0
// Golden data: outputs of a real GPU for the inputs of the wrapper tests, compared with the
// models'. Two files each:
//   golden/<name>.json  {"name": .., "device": .., "words": n, "inputs": "<their FNV-1a hash>"}
//   golden/<name>.bin   the n 32-bit output words, little-endian
// They are written by the GPU build of these tests: `--dump-golden tests/cpp/golden "NVIDIA H100"`.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace golden {

// Compares `outputs` with the golden words, one by one; counts a check, or notes that there is no
// golden data.
void compare(const std::string& name, const uint32_t* inputs, size_t input_words,
             const uint32_t* outputs, size_t output_words,
             const std::function<bool(uint32_t got, uint32_t golden)>& agree);
void dump_to(const std::string& folder, const std::string& device);

}  // namespace golden
