# SPDX-License-Identifier: Apache-2.0
"""Ranks of one tensor-parallel model decode the same requests: what differs is said before the first forward.

Each layer waits for all ranks. Ranks that decode something else would wait for ever, or exchange what does not belong
together.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.adapt import DiffusionModel
from .config import DecodingConfig


def agree(
    model: DiffusionModel, tokens: dict[str, Tensor], config: DecodingConfig, seeds: Tensor, *others: Any
) -> None:
    """Give all ranks of a tensor-parallel model the seeds of the first one, in place; nothing for other models.

    Parameters
    ----------
    model : DiffusionModel
    tokens : dict of Tensor
        What must be the same on all ranks, by the name under which the caller has passed it.
    config : DecodingConfig
        Must be the same, too.
    seeds : Tensor
        int64 `[B]`, contiguous. They need not be the same: where none was given, each rank has drawn its own.
    others
        Further values that must be the same.

    Raises
    ------
    ValueError
        On every rank, when they were given different requests or configurations.
    """
    group = model.group
    if group is None:
        return
    values = {name: [list(x.shape), x.cpu().tolist()] for name, x in tokens.items()}
    options = re.sub(r" at 0x[0-9a-f]+", "", repr((config, others)))
    own = torch.tensor([*map(_digest, (*values.values(), options))], device=seeds.device)
    everyone = own.new_empty((dist.get_world_size(group), len(own)))
    dist.all_gather(list(everyone.unbind()), own, group=group)
    differs = (everyone != everyone[:1]).any(0).tolist()
    if any(differs):
        names = [name for name, is_other in zip((*values, "config"), differs) if is_other]
        raise ValueError(
            f"the ranks of a tensor-parallel model must decode the same; they were given different {', '.join(names)}"
        )
    dist.broadcast(seeds, dist.get_global_rank(group, 0), group=group)


def _digest(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
