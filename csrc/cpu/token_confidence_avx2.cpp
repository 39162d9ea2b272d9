// SPDX-License-Identifier: Apache-2.0
// The plain C++ for a compiler that may use AVX2: the same operations, so the same bits, on vectors
// of 8 floats. And rows of few logits.
#include "cpu/simd_avx2.h"
#define DLM_NAMESPACE avx2
#include "cpu/token_confidence_generic.cpp"
//
#include "cpu/token_confidence_few.h"
