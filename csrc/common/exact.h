// SPDX-License-Identifier: Apache-2.0
// Single IEEE-754 operations, each rounded to nearest even separately. nvcc would contract a
// product and a sum into one fused operation; kernels use these functions where the bits must equal
// those of the CPU (which is compiled without contraction).
#pragma once
#include "common/dtype.h"

namespace dlm {

#if defined(__CUDA_ARCH__)
DLM_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
DLM_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DLM_HD float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DLM_HD float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DLM_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
DLM_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
#else
DLM_HD float add_rn(float a, float b) { return a + b; }
DLM_HD float mul_rn(float a, float b) { return a * b; }
DLM_HD float div_rn(float a, float b) { return a / b; }
DLM_HD double add_rn(double a, double b) { return a + b; }
DLM_HD double mul_rn(double a, double b) { return a * b; }
// One instruction in files compiled for a processor that has it, otherwise a C library call.
DLM_HD float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// a * b + c with two roundings (fma_rn: with one).
DLM_HD float mul_add_rn(float a, float b, float c) { return add_rn(mul_rn(a, b), c); }

}  // namespace dlm
