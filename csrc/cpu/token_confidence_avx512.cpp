// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx512.h"
#define DLM_NAMESPACE avx512
#include "cpu/token_confidence_vectors.h"
//
#include "cpu/token_confidence_few.h"
#include "cpu/token_confidence_loops.h"

namespace dlm::cpu::avx512 {

TokenConfidenceKernels token_confidence() {
  return {sum_chunks, load_chunk, sum_chunk,  summarize,   collect,
          mass_above, masses,     chunk_keys, race_tokens, measure_rows};
}

}  // namespace dlm::cpu::avx512
