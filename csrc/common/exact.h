// SPDX-License-Identifier: Apache-2.0
// Single IEEE-754 operations, each rounded to nearest even by itself. nvcc would contract a product
// and a sum into one fused operation; where the bits must be those of the CPU (built with
// contraction off), kernels use these.
#pragma once
#include "common/dtype.h"

namespace dlm {

#if defined(__CUDA_ARCH__)
DLM_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
DLM_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DLM_HD float div_rn(float a, float b) { return __fdiv_rn(a, b); }
#else
DLM_HD float add_rn(float a, float b) { return a + b; }
DLM_HD float mul_rn(float a, float b) { return a * b; }
DLM_HD float div_rn(float a, float b) { return a / b; }
#endif

// a * b + c with two roundings.
DLM_HD float mul_add_rn(float a, float b, float c) { return add_rn(mul_rn(a, b), c); }

}  // namespace dlm
