# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: models whose weight matrices transformers has sharded over ranks.

`from_pretrained(…, distributed_config=DistributedConfig(tp_size=n))` gives every rank a shard, stored as `DTensor`, of
the attention heads, the feed-forward layers and the vocabulary; the layers sum the ranks' results. A model loaded this
way decodes like any other, as long as all ranks run the same forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: `ops.shard_confidence` needs shards of the vocabulary that start at multiples of this number of tokens.
CHUNK = 256
#: Re-sharded heads, for weights whose shards do not start at multiples of `CHUNK`: (version of the weights, shard).
_moved: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class HeadShard:
    """A rank's shard of a language-model head.

    Attributes
    ----------
    weight : Tensor
        `[n, hidden]`: weights of tokens `[first, first + n)`.
    first : int
        First token of the shard, a multiple of 256.
    vocab : int
        Size of the whole vocabulary.
    group : ProcessGroup
        Process group over which the head is sharded. Each rank has at least one token.
    """

    weight: Tensor
    first: int
    vocab: int
    group: Any


def group_of(model: Any) -> Any:
    """Return the process group over which a model's parameters are sharded, or None if they are not.

    Raises
    ------
    ValueError
        If they are sharded in another way than by tensor parallelism (FSDP or pipelines, for example).
    """
    if not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return None
    for parameter in model.parameters():
        if _is_divided(parameter):
            return _group(parameter)
    return None


def check_division(model: nn.Module) -> None:
    """Raise ValueError if a model is sharded in a way that decoding does not support."""
    group = group_of(model)
    if group is None:
        return
    ranks, config = dist.get_world_size(group), getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    style = (getattr(model, "_tp_plan", None) or {}).get("lm_head")
    if style == "colwise":
        raise ValueError(
            "model: its tp_plan has lm_head='colwise', which leaves each rank with the logits of only a part of the "
            "vocabulary: remove lm_head from the plan, or use 'colwise_gather_output'"
        )
    divided = any(name.endswith("k_proj.weight") and _is_divided(p) for name, p in model.named_parameters())
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if divided and isinstance(heads, int) and heads % ranks:
            raise ValueError(
                f"model: its {name}={heads} must be divisible by tp_size={ranks}, so that each rank has whole heads"
            )


def head_shard(head: Any) -> HeadShard | None:
    """Return this rank's shard of a linear head without bias that is sharded over the vocabulary, or None.

    All ranks of a group must call this together. If shards do not start at multiples of 256, the first call gathers the
    weights and keeps a suitable shard on each rank, in addition to the model's own.
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
    width = -(-vocab // ranks)  # how torch splits a dimension
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
            f"model: its parameters are sharded over the device mesh dimensions {', '.join(others) or names}; only "
            "tensor parallelism (tp_size) is supported"
        )
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()
