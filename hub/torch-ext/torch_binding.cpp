// SPDX-License-Identifier: Apache-2.0
// The module that Python imports. It is empty: loading its library registers the ops
// (csrc/torch/ops.cpp) under the name chosen by the build. registration.h comes from
// kernel-builder.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
