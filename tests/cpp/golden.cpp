// SPDX-License-Identifier: Apache-2.0
#include "golden.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "check.h"

namespace golden {
namespace {

std::string dump_folder, dump_device;

std::string hash(const uint32_t* words, size_t n) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < n; ++i) {
    for (int byte = 0; byte < 4; ++byte) h = (h ^ (words[i] >> byte * 8 & 255)) * 0x100000001b3ull;
  }
  char text[20];
  snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(h));
  return text;
}
std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
std::string folder() {
  const char* chosen = getenv("DLM_GOLDEN");
  return chosen ? chosen : DLM_GOLDEN_FOLDER;
}

}  // namespace

void dump_to(const std::string& folder, const std::string& device) {
  dump_folder = folder;
  dump_device = device;
}

void compare(const std::string& name, const uint32_t* inputs, size_t input_words,
             const uint32_t* outputs, size_t output_words,
             const std::function<bool(uint32_t, uint32_t)>& agree) {
  const std::string key = hash(inputs, input_words);
  if (!dump_folder.empty()) {
    std::ofstream(dump_folder + "/" + name + ".json")
        << "{\"name\": \"" << name << "\", \"device\": \"" << dump_device
        << "\", \"words\": " << output_words << ", \"inputs\": \"" << key << "\"}\n";
    std::ofstream(dump_folder + "/" + name + ".bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(outputs), std::streamsize(output_words * 4));
    return;
  }
  const std::string about = read(folder() + "/" + name + ".json"),
                    bytes = read(folder() + "/" + name + ".bin");
  if (about.empty()) {
    printf("  %s: no golden data yet: consistent with the model only\n", name.c_str());
    return;
  }
  const bool same_inputs = about.find("\"" + key + "\"") != about.npos;
  CHECK(same_inputs, "%s: golden data of other inputs", name.c_str());
  CHECK(bytes.size() == output_words * 4, "%s: golden data of %zu bytes, expected %zu",
        name.c_str(), bytes.size(), output_words * 4);
  if (bytes.size() != output_words * 4) return;
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < output_words; ++i) {
    uint32_t word;
    memcpy(&word, bytes.data() + i * 4, 4);
    if (!agree(outputs[i], word) && wrong++ == 0) first = i;
  }
  CHECK(wrong == 0, "%s: %zu of %zu words differ from the golden ones, first at %zu", name.c_str(),
        wrong, output_words, first);
}

}  // namespace golden
