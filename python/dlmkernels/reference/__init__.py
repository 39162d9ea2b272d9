# SPDX-License-Identifier: Apache-2.0
"""Specification of every op in plain torch, for any device and without regard for speed.

A kernel is correct if it agrees with the function of the same name here: ids, masks and counts exactly, floats within
the tolerance policy of the tests.
"""

from .block_attention import block_attention as block_attention
from .block_attention import block_attention_mask as block_attention_mask
from .lm_head_candidates import lm_head_candidates as lm_head_candidates
from .lm_head_confidence import lm_head_confidence as lm_head_confidence
from .normals import normals as normals
from .normals import uniforms as uniforms
from .randomness import STREAMS as STREAMS
from .randomness import bernoulli as bernoulli
from .randomness import exponential as exponential
from .randomness import gumbel as gumbel
from .randomness import philox as philox
from .randomness import uniform_below as uniform_below
from .remask import remask_ as remask_
from .rows import per_row as per_row
from .select_tokens import select_tokens as select_tokens
from .shard_confidence import shard_confidence as shard_confidence
from .soft_embedding import soft_embedding as soft_embedding
from .splice import splice_ as splice_
from .token_confidence import FLAG_NAN as FLAG_NAN
from .token_confidence import FLAG_NOTHING_ALLOWED as FLAG_NOTHING_ALLOWED
from .token_confidence import FLAG_POSITIVE_INFINITY as FLAG_POSITIVE_INFINITY
from .token_confidence import token_confidence as token_confidence
from .top_candidates import top_candidates as top_candidates
from .verify_drafts import verify_drafts as verify_drafts
