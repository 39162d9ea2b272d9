# SPDX-License-Identifier: Apache-2.0
"""The ops, one function each: documentation, default values, and a call of torch.ops.dlmkernels.

An argument that may hold a single value for all rows also accepts a Python or numpy number: ``temperature=0.7``. No op
is differentiable: calling one where a gradient would be recorded raises an error. Tensors that an op writes to must not
share memory with its other arguments.
"""

from ..arguments import ArgumentError as ArgumentError
from .block_attention import BlockAttention as BlockAttention
from .block_attention import block_attention as block_attention
from .lm_head_candidates import lm_head_candidates as lm_head_candidates
from .lm_head_confidence import lm_head_confidence as lm_head_confidence
from .remask import INFO_FIELDS as INFO_FIELDS
from .remask import STATE_DIRTY as STATE_DIRTY
from .remask import STATE_EDITED as STATE_EDITED
from .remask import STATE_FROZEN as STATE_FROZEN
from .remask import STATE_OPEN as STATE_OPEN
from .remask import remask_ as remask_
from .select_tokens import SelectedTokens as SelectedTokens
from .select_tokens import select_tokens as select_tokens
from .shard_confidence import combine_shards as combine_shards
from .shard_confidence import shard_confidence as shard_confidence
from .soft_embedding import soft_embedding as soft_embedding
from .splice import SPLICE_FIELDS as SPLICE_FIELDS
from .splice import Spliced as Spliced
from .splice import splice_ as splice_
from .token_confidence import FLAG_NAN as FLAG_NAN
from .token_confidence import FLAG_NOTHING_ALLOWED as FLAG_NOTHING_ALLOWED
from .token_confidence import FLAG_POSITIVE_INFINITY as FLAG_POSITIVE_INFINITY
from .token_confidence import TokenConfidence as TokenConfidence
from .token_confidence import token_confidence as token_confidence
from .top_candidates import TopCandidates as TopCandidates
from .top_candidates import top_candidates as top_candidates
from .verify_drafts import VerifiedDrafts as VerifiedDrafts
from .verify_drafts import verify_drafts as verify_drafts
