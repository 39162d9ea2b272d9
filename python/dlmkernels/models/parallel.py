# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: models whose matrices transformers has divided among ranks.

`from_pretrained(…, distributed_config=DistributedConfig(tp_size=n))` gives every rank a part of the heads of attention,
of the feed-forward layers and of the vocabulary, as a `DTensor` each, and lets the layers add up what the ranks have. A
model so loaded decodes like any other, as long as all ranks make the same forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: Where the vocabulary may be divided for `ops.shard_confidence`: at multiples of so many tokens.
CHUNK = 256
#: Heads whose shards had to be moved to multiples of `CHUNK`: (version of the weights, what is kept of them).
_moved: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class HeadShard:
    """A rank's part of a language-model head.

    Attributes
    ----------
    weight : Tensor
        `[n, hidden]`: those of tokens `[first, first + n)`.
    first : int
        A multiple of 256.
    vocab : int
        Tokens of the whole vocabulary.
    group : ProcessGroup
        The ranks among which it is divided; each of them has at least one token.
    """

    weight: Tensor
    first: int
    vocab: int
    group: Any


def group_of(model: Any) -> Any:
    """The process group among which the parameters of a model are divided, None where they are not.

    Raises
    ------
    ValueError
        When they are divided in another way than by tensor parallelism (FSDP, pipelines).
    """
    if not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return None
    for parameter in model.parameters():
        if _is_divided(parameter):
            return _group(parameter)
    return None


def check_division(model: nn.Module) -> None:
    """Raise a ValueError if a model is divided in a way in which its layers do not decode."""
    group = group_of(model)
    if group is None:
        return
    ranks, config = dist.get_world_size(group), getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    style = (getattr(model, "_tp_plan", None) or {}).get("lm_head")
    if style == "colwise":
        raise ValueError(
            "model: its tp_plan has lm_head='colwise', with which each rank has the logits of a part of the "
            "vocabulary: leave lm_head out of the plan, or say 'colwise_gather_output'"
        )
    divided = any(name.endswith("k_proj.weight") and _is_divided(p) for name, p in model.named_parameters())
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if divided and isinstance(heads, int) and heads % ranks:
            raise ValueError(
                f"model: its {name} of {heads} cannot be divided among tp_size={ranks} ranks: each needs whole heads"
            )


def head_shard(head: Any) -> HeadShard | None:
    """This rank's part of a head that is a linear layer without a bias, divided by the vocabulary; None of any other.

    The ranks of a group must call this together: where shards do not begin at multiples of 256, the first call gathers
    the weights once, and keeps the rank's part of them beside the model.
    """
    if type(head) is not nn.Linear or head.bias is not None or head._forward_hooks or head._forward_pre_hooks:
        return None
    weight: Any = head.weight
    if not _is_divided(weight) or not weight.placements[-1].is_shard(0):
        return None
    group, vocab = _group(weight), len(weight)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    chunks = -(-vocab // CHUNK)
    if chunks < ranks:
        return None
    width = -(-vocab // ranks)  # as torch divides
    if width % CHUNK == 0 and width * (ranks - 1) < vocab:
        return HeadShard(weight.to_local().detach(), rank * width, vocab, group)
    first, last = (chunks * r // ranks * CHUNK for r in (rank, rank + 1))
    version, kept = _moved.get(weight, (None, None))
    if version != weight.to_local()._version:
        with torch.no_grad():
            kept = weight.full_tensor()[first:last].clone()
        _moved[weight] = weight.to_local()._version, kept
    return HeadShard(kept, first, vocab, group)


def _is_divided(parameter: Any) -> bool:
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and mesh.size() > 1


def _group(parameter: Any) -> Any:
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("tp",) * mesh.ndim
    sizes = dict(zip(names, mesh.shape))
    others = sorted(name for name, size in sizes.items() if name != "tp" and size > 1)
    if others or (mesh.ndim > 1 and "tp" not in sizes):
        raise ValueError(
            f"model: its parameters are divided over the dimensions {', '.join(others) or names} of a device mesh; "
            "only tensor parallelism (tp_size) is decoded with"
        )
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()
