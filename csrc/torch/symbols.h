// SPDX-License-Identifier: Apache-2.0
// Functions of torch's libraries that the stable ABI lacks, or has only in some versions. They are
// looked up by name when first needed, in libraries that torch has loaded. Null if there is none,
// so that one build works with every version of torch.
#pragma once
#include <dlfcn.h>

namespace dlm {

template <class Function>
Function* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? reinterpret_cast<Function*>(dlsym(handle, name)) : nullptr;
}

}  // namespace dlm
