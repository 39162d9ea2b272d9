// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx512.h"
#define DLM_NAMESPACE avx512
#include "cpu/soft_embedding_vectors.h"
