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
DLM_HD float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DLM_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
DLM_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
#else
DLM_HD float add_rn(float a, float b) { return a + b; }
DLM_HD float mul_rn(float a, float b) { return a * b; }
DLM_HD float div_rn(float a, float b) { return a / b; }
DLM_HD double add_rn(double a, double b) { return a + b; }
DLM_HD double mul_rn(double a, double b) { return a * b; }
// One instruction in files that are compiled for a processor with it, else a call of the C library.
DLM_HD float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// a * b + c with two roundings (fma_rn: with one).
DLM_HD float mul_add_rn(float a, float b, float c) { return add_rn(mul_rn(a, b), c); }

}  // namespace dlm
