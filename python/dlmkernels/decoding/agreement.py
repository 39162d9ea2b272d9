# SPDX-License-Identifier: Apache-2.0
"""Check, before the first forward pass, that all ranks of a tensor-parallel model decode the same requests.

Every layer waits for all ranks. Ranks that decode something different would wait forever, or combine unrelated data.
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
    """Check that all ranks of a tensor-parallel model agree, and copy the first rank's seeds to them, in place.

    Does nothing for other models.

    Parameters
    ----------
    model : DiffusionModel
    tokens : dict of Tensor
        Tensors that must be the same on all ranks, by the caller's name for them.
    config : DecodingConfig
        Must be the same on all ranks.
    seeds : Tensor
        int64 `[B]`, contiguous. They may differ between ranks: if the user gave none, each rank has drawn its own.
    others
        Further values that must be the same on all ranks.

    Raises
    ------
    ValueError
        On every rank, if their requests or configurations differ.
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
            f"all ranks of a tensor-parallel model must be given the same arguments; these differ: {', '.join(names)}"
        )
    dist.broadcast(seeds, dist.get_global_rank(group, 0), group=group)


def _digest(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
