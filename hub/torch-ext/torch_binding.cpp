// SPDX-License-Identifier: Apache-2.0
// The module that Python imports: it is empty, its library registers the ops (csrc/torch/ops.cpp)
// under the name that the build gives it. registration.h comes from kernel-builder.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
