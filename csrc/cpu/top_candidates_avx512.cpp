// SPDX-License-Identifier: Apache-2.0
#define DLM_NAMESPACE avx512
#include "cpu/top_candidates_loops.h"
