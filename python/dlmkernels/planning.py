# SPDX-License-Identifier: Apache-2.0
"""How much memory a decoding takes, found out before any weight is loaded.

The model is built of tensors that have shapes and no memory, a forward of it is run, and what would be alive at the
same time is counted. So the numbers are those of the model's own code, whatever its architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .cache import KVCache
from .decoding.checks import flag, integer
from .models.adapt import DiffusionModel, adapt, unloaded
from .models.load import outline
from .models.moment import Moment
from .window import AttentionWindow

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class MemoryPlan:
    """What a decoding needs, in bytes.

    Attributes
    ----------
    batch, length, block_length : int
        Requests decoded at a time, columns of each with its prompt, and how many of them a step decides among.
    parameters : int
        Numbers in the model's weights; tied ones count once.
    weights : int
        The model's weights and buffers.
    cache : int
        Keys and values of all columns; 0 without a cache.
    forward : int
        The most that a forward of the whole canvas has in memory at a time, beside weights and cache. With a cache it
        is needed where a prompt is read and where the cache is renewed.
    step : int
        The same for a forward of one block; without a cache every forward is of the whole canvas.
    logits : int
        Logits of a block, or the budget where they would take more.
    """

    batch: int
    length: int
    block_length: int
    parameters: int
    weights: int
    cache: int
    forward: int
    step: int
    logits: int

    @property
    def total(self) -> int:
        """The most that is needed at a time: a forward is over before there are logits."""
        return self.weights + self.cache + max(self.forward, self.logits)

    def longest(self, memory: int | str) -> int:
        """The largest `length` for which `memory` bytes suffice at this batch; 0 if the weights alone do not fit.

        `memory` may be text with a unit: "24G" is 24 · 2³⁰ bytes.
        """
        memory = read_bytes("memory", memory)
        fixed = self.weights + self.logits
        per_column = (self.cache + self.forward) / self.length
        return max(int((memory - fixed) / per_column), 0) if memory > fixed else 0

    def __str__(self) -> str:
        rows = {
            f"weights ({self.parameters / 1e6:,.1f} million parameters)": self.weights,
            "keys and values": self.cache,
            "forward of the whole canvas": self.forward,
            "forward of a block": self.step,
            "logits of a step": self.logits,
            "at most at a time": self.total,
        }
        head = f"batch {self.batch}, {self.length} tokens each, blocks of {self.block_length}"
        return "\n".join([head, *(f"  {name:<44}{_readable(size):>12}" for name, size in rows.items() if size)])


def plan(
    model: Any, batch: int = 1, length: int | None = None, *, block_length: int | None = None, cache: bool = True,
    logits_budget: int | str = 256 << 20, dtype: str | torch.dtype | None = None, family: str | None = None,
) -> MemoryPlan:  # fmt: skip
    """How much memory a decoding takes. Of a path or a hub id the configuration alone is read.

    Parameters
    ----------
    model : str, path or DiffusionModel
        What `load` takes (a folder or a hub id), or what `adapt` returned.
    batch, length : int
        Requests decoded at a time, and tokens of each, its prompt included (None: 2048, or as many as the model can
        encode). With guidance the batch counts twice.
    block_length : int, optional
        Positions that a step decides among. None: all.
    cache : bool
        Whether keys and values are kept. The caches that look into layers keep more than this counts: see the memory
        they state, or `Engine.memory`.
    logits_budget : int or str
        Bytes that the logits of a step may take (see `DecodingConfig.logits_budget`).
    dtype : str or torch.dtype, optional
        Of the weights. None: as the configuration says, else bfloat16.
    family : str, optional
        As in `load`.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ValueError
        When there is no such model, the length is more than it can encode, or a number is out of range.

    Notes
    -----
    Not counted: what the allocator and CUDA itself take (some hundred megabytes), workspaces of matrix products, and
    the pools of captured graphs. Where shapes within a forward depend on values (some mixtures of experts, ModernBERT),
    `forward` and `step` are estimates, of 16 hidden vectors a column. A quantised model takes less than its
    configuration's dtype says.

    Examples
    --------
    >>> print(dlmkernels.plan("GSAI-ML/LLaDA-8B-Instruct", batch=8, length=4096, block_length=32))
    """
    integer(1)("batch", batch)
    cache = flag("cache", cache)
    integer(1, optional=True)("length", length)
    integer(1, optional=True)("block_length", block_length)
    logits_budget = read_bytes("logits_budget", logits_budget)
    if isinstance(model, (str, PathLike)):
        make, own_family = outline(model, family, dtype)
    else:
        make, own_family = _as_loaded(model, family, dtype)
    with FakeTensorMode(), no_init_weights():
        empty = make()
        empty.tie_weights()
        adapted = unloaded(empty, own_family)
        length = length or min(2048, adapted.max_length or 2048)
        block = min(block_length or length, length)
        if adapted.max_length is not None and length > adapted.max_length:
            raise ValueError(f"length must be at most {adapted.max_length}, which the model can encode; got {length}")
        weights = list(adapted.model.parameters())
        kept = KVCache(length, batch) if cache and adapted.reuses_kv else None
        try:
            forward = _peak(adapted, batch, length, length, kept)
            step = forward if kept is None else _peak(adapted, batch, block, length, kept)
            cached = 0 if kept is None else kept.num_bytes
        except (DataDependentOutputException, DynamicOutputShapeException):
            row, cached_row = _estimated(adapted)
            forward, step = row * batch * length, row * batch * (length if kept is None else block)
            cached = 0 if kept is None else cached_row * batch * length
        row = (adapted.vocab_size or 0) * weights[0].element_size()
        return MemoryPlan(
            batch, length, block, sum(x.numel() for x in weights), _bytes([*weights, *adapted.model.buffers()]),
            cached, forward, step, max(row, min(row * batch * block, logits_budget)),
        )  # fmt: skip


def read_bytes(name: str, value: int | str) -> int:
    """A number of bytes, as a number or as text with a unit (K, M, G, T: powers of 1024)."""
    if isinstance(value, str):
        text = value.strip().upper().removesuffix("IB").removesuffix("B")
        number, unit = (text[:-1], text[-1:]) if text[-1:] in UNITS and text[-1:].isalpha() else (text, "")
        try:
            value = int(float(number) * UNITS[unit])
        except ValueError:
            raise ValueError(f"{name} must be a number of bytes, such as 24G; got '{value}'") from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a number of bytes, at least 1; got {value!r}")
    return value


def _as_loaded(model: Any, family: str | None, dtype: Any) -> tuple[Callable[[], Any], str]:
    """What `outline` returns, of a model that is loaded."""
    adapted = adapt(model, family=family)
    within: Any = adapted.model
    if not isinstance(within, PreTrainedModel):
        raise ValueError(f"model must be one of transformers'; got {type(within).__name__}")
    config = copy.deepcopy(within.config)
    return lambda: type(within)._from_config(config, dtype=dtype or within.dtype).eval(), adapted.family.name


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _peak(model: DiffusionModel, batch: int, columns: int, length: int, cache: KVCache | None) -> int:
    """The most that a forward of so many columns of a canvas has alive at a time, beside weights and cache."""
    tokens, position = torch.zeros(batch, columns, dtype=torch.int64, device="cpu"), torch.arange(columns, device="cpu")
    position = position.expand(batch, columns)
    slots = None if cache is None and columns == length else position.int().contiguous()
    window = AttentionWindow(slots, cache=cache, rotations=model.rotations(torch.full((batch,), length, device="cpu")))
    told: dict[str, Any] = {"moment": Moment(torch.ones(batch, device="cpu"))} if model.takes_time else {}
    before = 0 if cache is None else cache.num_bytes
    with torch.no_grad(), _Alive() as alive:
        model.hidden(tokens, position, window, **told)
    return alive.most - (0 if cache is None else cache.num_bytes - before)


def _estimated(model: DiffusionModel) -> tuple[int, int]:
    """Bytes that a column takes in a forward, and in a cache, by the configuration."""
    config, size = model.config, next(model.model.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 16 * config.hidden_size * size, 2 * config.num_hidden_layers * heads * width * size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all of them, each counted once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


class _Alive(TorchDispatchMode):
    """Counts the bytes that operations have allocated and that are still in use.

    Attributes
    ----------
    most : int
        The most there ever was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return out
