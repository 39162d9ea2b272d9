// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/simd_avx512.h"
#define DLM_NAMESPACE avx512
#include "cpu/block_attention_vectors.h"
