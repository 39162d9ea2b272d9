// SPDX-License-Identifier: Apache-2.0
#include "cpu/verify_drafts.h"

namespace dlm::cpu {

void verify_drafts(const VerifyDraftsParams& p, int64_t begin, int64_t end) {
  generic::verify_drafts(p, begin, end);
}

}  // namespace dlm::cpu
