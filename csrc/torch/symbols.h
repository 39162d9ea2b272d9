// SPDX-License-Identifier: Apache-2.0
// Functions of torch's libraries that the stable ABI has not, or not in every version: looked up by
// name when first needed, in libraries that torch has loaded. Null where there is none, so that one
// build loads beside every torch.
#pragma once
#include <dlfcn.h>

namespace dlm {

template <class Function>
Function* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? reinterpret_cast<Function*>(dlsym(handle, name)) : nullptr;
}

}  // namespace dlm
