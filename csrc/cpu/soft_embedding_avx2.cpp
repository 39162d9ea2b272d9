// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx2.h"
#define DLM_NAMESPACE avx2
#include "cpu/soft_embedding_vectors.h"
