// SPDX-License-Identifier: Apache-2.0
#define DLM_NAMESPACE avx2
#include "cpu/top_candidates_loops.h"
