// SPDX-License-Identifier: Apache-2.0
#define DLM_NAMESPACE generic
#include "cpu/top_candidates_loops.h"
