# SPDX-License-Identifier: Apache-2.0
"""Compute how much memory a decoding needs before any weights are loaded.

The model is built from tensors that have shapes but no storage, a forward pass is run, and the sizes of all tensors
that would be alive at the same time are added up. The numbers therefore come from the model's own code, whatever its
architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
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
from .decoding.checks import flag, integer, plain
from .models.adapt import DiffusionModel, adapt, unloaded
from .models.load import outline
from .models.moment import Moment
from .window import AttentionWindow

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a decoding needs, in bytes.

    Attributes
    ----------
    batch, length, block_length : int
        Number of requests decoded at a time, number of columns of each including its prompt, and number of columns that
        a step decides among.
    parameters : int
        Number of model parameters; tied weights count once.
    weights : int
        The model's weights and buffers.
    cache : int
        Keys and values of all columns; 0 without a cache.
    forward : int
        Peak memory of a forward pass over the whole canvas (prompt and answer), in addition to weights and cache. With
        a cache, such a forward happens when a prompt is read and when the cache is refreshed.
    step : int
        Peak memory of a forward pass over one block, in addition to weights and cache. Without a cache, every forward
        covers the whole canvas.
    logits : int
        Logits of a block, or the logits budget if that is smaller, but at least one row of logits.
    max_length : int, optional
        Largest `length` that the model can encode; None if it has no limit.
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
    max_length: int | None = None

    @property
    def total(self) -> int:
        """Peak memory of the decoding. The logits exist only after a forward pass has finished."""
        return self.weights + self.cache + max(self.forward, self.logits)

    def longest(self, memory: int | str) -> int:
        """Return the largest `length` for which `memory` bytes suffice at this batch size.

        Returns 0 if the weights alone do not fit. The model's `max_length` is not considered. `memory` may be a string
        with a unit: "24G" is 24 · 2³⁰ bytes.
        """
        memory = read_bytes("memory", memory)
        fixed = self.weights + self.logits
        per_column = (self.cache + self.forward) / self.length
        return int((memory - fixed) // Fraction(per_column)) if memory > fixed else 0

    def __str__(self) -> str:
        rows = {
            f"weights ({self.parameters / 1e6:,.1f} million parameters)": self.weights,
            "keys and values": self.cache,
            "forward of the whole canvas": self.forward,
            "forward of a block": self.step,
            "logits of a step": self.logits,
            "peak": self.total,
        }
        head = f"batch {self.batch}, {self.length} tokens each, blocks of {self.block_length}"
        return "\n".join([head, *(f"  {name:<44}{_readable(size):>12}" for name, size in rows.items() if size)])


def plan(
    model: Any, batch: int = 1, length: int | None = None, *, block_length: int | None = None, cache: bool = True,
    logits_budget: int | str = 256 << 20, dtype: str | torch.dtype | None = None, family: str | None = None,
) -> MemoryPlan:  # fmt: skip
    """Compute how much memory a decoding needs. For a path or a hub id, only the configuration is read.

    Parameters
    ----------
    model : str, path or DiffusionModel
        A folder or a hub id, as for `load`, or the result of `adapt`.
    batch, length : int
        Number of requests decoded at a time, and number of tokens of each, including its prompt. If `length` is None,
        2048, or as many as the model can encode if that is fewer. With guidance, count each request twice.
    block_length : int, optional
        Number of positions that a step decides among. If None, all.
    cache : bool
        Whether keys and values are cached. Caches that look inside layers store more than is counted here: see the
        memory that their documentation states, or `Engine.memory`.
    logits_budget : int or str
        Maximum number of bytes for the logits of a step (see `DecodingConfig.logits_budget`).
    dtype : str or torch.dtype, optional
        Dtype of the weights. If None, as given by the configuration, or bfloat16 if it gives none.
    family : str, optional
        As in `load`.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ValueError
        If there is no such model, the length exceeds what it can encode, or a number or `dtype` is out of range.

    Notes
    -----
    Not counted: the memory that the allocator and CUDA use themselves (a few hundred megabytes), workspaces of matrix
    products, and the pools of captured graphs. If shapes within a forward pass depend on values (some mixtures of
    experts, ModernBERT), `forward` and `step` are estimates, of 16 hidden vectors per column. A quantized model needs
    less memory than its configuration's dtype suggests.

    Examples
    --------
    >>> print(dlmkernels.plan("GSAI-ML/LLaDA-8B-Instruct", batch=8, length=4096, block_length=32))
    """
    batch = integer(1)("batch", batch)
    cache = flag("cache", cache)
    length = integer(1, optional=True)("length", length)
    block_length = integer(1, optional=True)("block_length", block_length)
    dtype = _dtype(dtype)
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
            raise ValueError(f"length must be at most {adapted.max_length}, the model's maximum; got {length}")
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
            cached, forward, step, max(row, min(row * batch * block, logits_budget)), adapted.max_length,
        )  # fmt: skip


def read_bytes(name: str, value: int | str) -> int:
    """Parse a number of bytes, given as a number or as a string with a unit (K, M, G, T: powers of 1024)."""
    size = plain(value)
    if isinstance(value, str):
        text = value.strip().upper().removesuffix("IB").removesuffix("B")
        number, unit = (text[:-1], text[-1:]) if text[-1:] in UNITS and text[-1:].isalpha() else (text, "")
        try:
            size = int(float(number) * UNITS[unit])
        except (ValueError, OverflowError):
            raise ValueError(f"{name} must be a number of bytes, such as 24G; got '{value}'") from None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a number of bytes, at least 1; got {value!r}")
    return size


def _dtype(dtype: Any) -> torch.dtype | None:
    """Check the dtype of weights, given by name or itself."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if dtype is None:
        return None
    raise ValueError(f"dtype must be None or a floating-point dtype, such as 'bfloat16'; got {dtype!r}")


def _as_loaded(model: Any, family: str | None, dtype: Any) -> tuple[Callable[[], Any], str]:
    """Return what `outline` returns, for a model that is already loaded."""
    adapted = adapt(model, family=family)
    within: Any = adapted.model
    if not isinstance(within, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel; got {type(within).__name__}")
    config = copy.deepcopy(within.config)
    return lambda: type(within)._from_config(config, dtype=dtype or within.dtype).eval(), adapted.family.name


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _peak(model: DiffusionModel, batch: int, columns: int, length: int, cache: KVCache | None) -> int:
    """Return the peak memory of a forward pass over `columns` columns of a canvas, besides weights and cache."""
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
    """Estimate the bytes per column of a forward pass, and of a cache, from the configuration."""
    config, size = model.config, next(model.model.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 16 * config.hidden_size * size, 2 * config.num_hidden_layers * heads * width * size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total size of the tensors in bytes, counting each tensor once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


class _Alive(TorchDispatchMode):
    """Count the bytes that operations have allocated and that are still in use.

    Attributes
    ----------
    most : int
        The peak.
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
