# SPDX-License-Identifier: Apache-2.0
"""The configuration of a decoding: every option a user can set, checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    ELSEWHERE,
    FLOAT32,
    INT64,
    Check,
    ComparedByValue,
    PerRequest,
    each,
    equal,
    flag,
    integer,
    normalize,
    number,
    one_of,
    optional_flag,
    plain,
    several,
    temperature,
)
from .constraint import Constraint
from .features import FeatureCache, cache_or
from .rules import Quota, Rule, Threshold
from .scores import SCORES, Score

CACHES = ("none", "prefix", "dual", "delayed", "block")
APPROXIMATE = ("prefix", "dual", "delayed")
ALIGNMENTS = ("same", "shift")
ATTENTIONS = ("full", "block", "causal", "causal-context", "reordered")
GRIDS = ("absolute", "prompt", "both-ways")
LM_HEADS = ("auto", "fused", "logits", "sharded")
DISTRIBUTIONS = ("raw", "tempered", "filtered")
EOS_POLICIES = ("none", "fill", "block")


def _token_ids(name: str, value: Any) -> int | tuple | None:
    """Check one token id, several, or several per request. The model's vocabulary size is not known here."""
    value = plain(value)
    if value is None:
        return None
    if isinstance(value, int | float):
        return _token_id(name, value)
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and any(isinstance(one, Sequence) and not isinstance(one, str) for one in value):
        return several(several(_token_id))(name, value)
    return several(_token_id)(name, value)


def _token_id(name: str, value: Any) -> Any:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
        raise ValueError(f"{name} must be a token id, an integer; got {value!r}")
    return value


def _optional_token_id(name: str, value: Any) -> Any:
    return None if value is None else _token_id(name, value)


def _seed(name: str, value: Any) -> int | Tensor | None:
    """Check a seed: one integer, or one per request."""
    value = plain(value)
    one = integer(INT64.min, INT64.max)
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return torch.tensor(several(one)(name, value), dtype=torch.int64, device="cpu")
    return one(name, value)


def _vicinity(name: str, value: Any) -> tuple[int, ...]:
    try:
        return several(integer(0), 2)(name, value) or ()
    except ValueError:
        raise ValueError(f"{name} must be two integers of at least 0; got {value!r}") from None


#: The check of each field whose value is not an object (such as a rule or a constraint).
LIMITS: dict[str, Check] = {
    "max_new_tokens": PerRequest(integer(1)), "warmup": integer(1),
    **{name: integer(1, optional=True) for name in ("block_length", "sub_block_length", "steps", "refresh_interval")},
    "top_k": PerRequest(integer(0)), "top_p": PerRequest(number(0.0, 1.0)), "cfg_scale": number(0.0, FLOAT32.max),
    "temperature": PerRequest(temperature), "order_temperature": temperature, "vicinity": _vicinity, "seed": _seed,
    **{name: flag for name in ("top_p_first", "keep_crossing", "sub_block_cache", "fuse_commit")},
    "seeded": optional_flag, "cache": cache_or(*CACHES), "distribution": one_of(*DISTRIBUTIONS),
    "lm_head": one_of(*LM_HEADS), "logits_budget": integer(1),
    "eos_policy": one_of(*EOS_POLICIES), "logit_alignment": one_of(None, *ALIGNMENTS),
    "attention": one_of(None, *ATTENTIONS), "block_grid": one_of(None, *GRIDS),
    "mask_token_id": _optional_token_id, "pad_token_id": _optional_token_id, "eos_token_id": _token_ids,
    "suppress_token_ids": several(_token_id), "defer_token_ids": several(_token_id),
}  # fmt: skip


#: The rule of a configuration that names none: commit every token the model is confident about. On the demo's tasks it
#: solves as many as one token per forward does, within noise, at 3 to 17 tokens per forward (docs/decoding.md).
DEFAULT_RULE: Rule = Threshold(0.95)
#: The default rule if `steps` is given, that is, if the user has fixed the number of forward passes.
FIXED_RULE: Rule = Quota()


@dataclass(frozen=True, eq=False, kw_only=True)
class OfTheFamily:
    """Options that default to what the model was trained with: if None, they follow the model or its family.

    Attributes
    ----------
    mask_token_id, eos_token_id, pad_token_id : int
        If None, taken from the model's configuration. `eos_token_id` may also be a sequence of several end tokens, or
        a sequence of sequences with the end tokens of each request.
    logit_alignment : {"same", "shift"}, optional
        Whether row i of the logits predicts position i ("same") or position i + 1 ("shift").
    attention : {"full", "block", "causal", "causal-context", "reordered"}, optional
        Which positions each position attends to (see `models.families.Family`).
    block_grid : {"absolute", "prompt", "both-ways"}, optional
        Where blocks are counted from with attention="block" (see `models.families.Family`).
    seeded : bool, optional
        Whether a block's first token is the one predicted by the row before the block. It is then committed before the
        block's first step.
    """

    mask_token_id: int | None = None
    eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None = None
    pad_token_id: int | None = None
    logit_alignment: str | None = None
    attention: str | None = None
    block_grid: str | None = None
    seeded: bool | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class OfTheRule:
    """Options that only some rules use: see `Rule.uses_steps` and `Rule.ignores`.

    Attributes
    ----------
    steps : int, optional
        Total number of forward passes, for rules with a fixed schedule (`Quota`, `TimeQuota`). They are divided evenly
        among the blocks; a remainder goes to the first blocks, one each. If None, one forward pass per token. Adaptive
        rules take as many as they need.
    score : {"probability", "margin", "entropy", "random", "position"} or Score
        How positions are ranked: by probability of the proposed token, by gap between the two largest probabilities,
        by negative entropy, at random, from left to right, or by a score from `dlmkernels.scores`.
    order_temperature : float
        If above 0, the ranking is drawn at random, position i with weight exp(score / order_temperature).
    defer_token_ids : sequence of int
        Positions at which one of these tokens is proposed are ranked last, whatever their score.
    """

    steps: int | None = None
    score: str | Score = "probability"
    order_temperature: float = 0.0
    defer_token_ids: Sequence[int] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingConfig(OfTheFamily, OfTheRule, ComparedByValue):
    """How to decode. Every field is also a keyword of `generate` and `infill`.

    Numbers may be Python or NumPy numbers or 0-dimensional tensors; where several are accepted, any sequence of them.
    Every option that you set must have an effect: one that has none with the rule, cache and attention in use is
    rejected with an error that names it. Fields of a preset are exempt. `OfTheFamily` and `OfTheRule` list the options
    that follow from the model's family or that only some rules use. The *canvas* is a request's prompt and its answer
    positions, which hold mask tokens until they are committed.

    Attributes
    ----------
    max_new_tokens : int or sequence of int
        Number of tokens to generate after the prompt; with rules that change the length, the maximum. A sequence gives
        each request its own length; each is decoded as it would be alone.
    block_length : int, optional
        Blocks are decoded from left to right, each until it has no mask token left. If None, the block length that the
        model was trained with if its attention has blocks; otherwise the whole answer is one block.
    sub_block_length : int, optional
        Decode each block in parts of this length, from left to right; each part attends to the whole block (Fast-dLLM
        v2, arXiv:2509.26328).
    rule : Rule, optional
        Chooses the positions that a step commits. If None, `DEFAULT_RULE`, which commits every token that the model is
        confident about; if `steps` is given, `Quota()`, which takes exactly that many forward passes.
    temperature : float or sequence of float
        If 0, take the most likely token; otherwise sample at this temperature (Gumbel-max). A sequence gives each
        request its own value, as it does for `top_k`, `top_p` and the thresholds of rules.
    top_k, top_p : int, float, or sequence of them
        Filters on the distribution that tokens are sampled from. 0 and 1, respectively, disable them.
    top_p_first, keep_crossing : bool
        Order of the filters, and whether the token that crosses `top_p` is kept (see `ops.token_confidence`).
    distribution : {"raw", "tempered", "filtered"}
        The distribution that scores are computed from: before temperature, after it, or after the filters.
    cache : {"none", "prefix", "dual", "delayed", "block"} or FeatureCache
        How the KV cache is reused. "none": each forward pass computes the whole canvas (exact). For models with full
        attention, all approximate: "prefix" keeps keys and values left of the block from the block's first forward
        pass (with the rule `EntropyPipeline`, as d3LLM does); "dual" also those right of it, so that a pass computes
        only the block (Fast-dLLM, arXiv:2505.22618); "delayed" keeps those of a token from the pass after its commit,
        so that a pass computes the open positions and the ones just committed (dKV-Cache, arXiv:2505.15781; with
        shifted logits, the rows that predict these); "dllm-cache", "sparse-dllm", "d2cache": see `DLLMCache`,
        `SparseCache`, `D2Cache`. For other attention, where a finished block never changes again: "block" appends each
        finished block once, and a pass computes only the open block (exact); "focus" computes even less of the block
        (approximate, see `FocusCache`).
    sub_block_cache : bool
        With cache="block" and a `sub_block_length`: a forward pass computes only the current part, and reads the rest
        of the block as it was when the part was begun (Fast-dLLM v2; approximate).
    warmup : int
        With cache="prefix", "dual" and "delayed": the number of forward passes at the start of each block that compute
        the whole canvas. With `sub_block_cache`: the number at the start of each part that compute the whole block.
    refresh_interval : int, optional
        Where `warmup` applies: repeat such a full forward pass every `refresh_interval` passes of a block (or part).
        If None, never.
    vicinity : tuple of int
        With cache="prefix" and "dual": how many positions left and right of the block each forward pass also computes
        (dInfer, arXiv:2510.08666).
    fuse_commit : bool
        With cache="block": append a finished block in the forward pass of the next block's first step, which saves one
        pass per block. Not possible if the next block's first token comes from the finished block (`seeded`), nor with
        attention="causal-context".
    seed : int or Tensor, optional
        Seed of a request's random draws, which do not depend on its batch. An int is the seed of every request, so that
        equal requests give equal results; an int64 tensor `[B]` has one each. If None, torch draws them.
    cfg_scale : float
        Scale of classifier-free guidance; 0 disables it. The logits become u + (cfg_scale + 1)(c - u), with the usual
        logits c and the logits u of a canvas whose given tokens are masked. Doubles the work.
    suppress_token_ids : sequence of int
        Tokens that are never generated. The mask token never is.
    constraint : Constraint or Tensor, optional
        A `Constraint` on the answer, or a tensor of allowed tokens: bool `[V]` or an int32 bitmask `[ceil(V / 32)]`
        (bit v % 32 of word v // 32) for all positions; `[N, …]` or `[B, N, …]` for each of the N = `max_new_tokens`
        positions of an answer (`infill`: of the canvas), where B and N may also be 1. Tokens beyond the end of a
        shorter last dimension are not allowed. Cannot be used with rules that insert or remove tokens, nor with a
        `Strided` that tests drafts by a ratio.
    logit_bias : dict or Tensor, optional
        Added to the logits of every position, after guidance and before temperature and filters: `{id: value}`, or a
        float tensor `[V]`. Confidence, margin and entropy are those of the biased logits, whatever `distribution` is.
    eos_policy : {"none", "fill", "block"}
        "fill": once an end token is committed and no position before it is open, the rest of the request becomes
        padding and the request is done. "block": the same, but only once the end token's block is finished, as rules
        that revise committed tokens require. "none": decode the full length.
    lm_head : {"auto", "fused", "logits", "sharded"}
        How logits are evaluated. "logits": the model's head, then `ops.token_confidence`. "fused":
        `ops.lm_head_confidence`, which never stores the logits. "sharded": `ops.shard_confidence` on each rank's part
        of a tensor-parallel model's vocabulary. The last two raise an error where they cannot be used. "auto": one of
        them where it can be used and is no slower (see `decoding.head`). Rounding differs, which may flip near ties.
    logits_budget : int
        Maximum size, in bytes, of the logits of a step. If they would take more, rows are processed in slices. It is
        exceeded where logits must be kept for longer (docs/memory.md lists the cases).
    """

    max_new_tokens: int | Sequence[int] = 128
    block_length: int | None = None
    sub_block_length: int | None = None
    rule: Rule = None  # type: ignore[assignment]  # never None after __post_init__
    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    top_p_first: bool = False
    keep_crossing: bool = True
    distribution: str = "raw"
    cache: str | FeatureCache = "none"
    sub_block_cache: bool = False
    warmup: int = 1
    refresh_interval: int | None = None
    vicinity: tuple[int, int] = (0, 0)
    fuse_commit: bool = True
    seed: int | Tensor | None = None
    cfg_scale: float = 0.0
    suppress_token_ids: Sequence[int] = ()
    constraint: Constraint | Tensor | None = None
    logit_bias: Mapping[int, float] | Tensor | None = None
    eos_policy: str = "fill"
    lm_head: str = "auto"
    logits_budget: int = 256 << 20

    def __post_init__(self):
        if self.rule is None:
            object.__setattr__(self, "rule", DEFAULT_RULE if self.steps is None else FIXED_RULE)
        check_logit_bias(self.logit_bias)
        if not isinstance(self.score, Score) and (not isinstance(self.score, str) or self.score not in SCORES):
            raise ValueError(f"score must be one of {tuple(SCORES)} or a Score; got {self.score!r}")
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a Rule such as dlmkernels.Threshold(0.9); got {self.rule!r}")
        if isinstance(self.constraint, Tensor) and self.constraint.dim() == 0:
            raise ValueError("constraint must have at least one dimension, that of tokens; got a tensor of shape []")
        if self.constraint is not None and not isinstance(self.constraint, (Constraint, Tensor)):
            raise TypeError(f"constraint must be a Constraint or a tensor; got {self.constraint!r}")
        normalize(self, LIMITS)
        self._ask(f.name for f in dataclasses.fields(self))

    @property
    def asked(self) -> frozenset[str]:
        """Fields that the user has set to something other than their default.

        Each of them must have an effect in the decoding (see `effects`). Fields set by a preset are not included, since
        part of a published decoder may have no effect with another model or next to the user's own changes.
        """
        return self.__dict__["_asked"]

    @property
    def samples(self) -> bool:
        """Whether any request samples its tokens instead of taking the most likely ones."""
        return any(t > 0 for t in each(self.temperature)) or self.rule.temperature(0, 1) is not None

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p is active in any request."""
        return any(k > 0 for k in each(self.top_k)) or any(p < 1 for p in each(self.top_p))

    @property
    def longest(self) -> int:
        """The largest `max_new_tokens` of any request."""
        return max(each(self.max_new_tokens))

    def replace(self, **changes) -> DecodingConfig:
        """Return a copy with some fields changed. An unknown field raises a TypeError that lists the known ones.

        A default rule is chosen again if `steps` changes: `steps` without a rule asks for a fixed schedule.
        """
        check_names(changes)
        if "steps" in changes and any(self.rule is rule for rule in (DEFAULT_RULE, FIXED_RULE)):
            changes = {"rule": None} | changes
        new = dataclasses.replace(self, **changes)
        new._ask(self.asked | set(changes))
        return new

    def as_preset(self) -> DecodingConfig:
        """Return a copy in which no field counts as set by the user (see `asked`)."""
        new = dataclasses.replace(self)
        new._ask(())
        return new

    def _ask(self, names: Iterable[str]) -> None:
        asked = frozenset(name for name in names if not equal(getattr(self, name), _default(name)))
        object.__setattr__(self, "_asked", asked)


def _default(name: str) -> Any:
    """Return the default value of a field."""
    return DEFAULT_RULE if name == "rule" else DecodingConfig.__dataclass_fields__[name].default


def check_names(options: Iterable[str]) -> None:
    """Raise a TypeError unless every option is a field of `DecodingConfig`."""
    known = DecodingConfig.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        hint = "".join(f"; {text}" for name, text in ELSEWHERE.items() if name in unknown)
        raise TypeError(f"unknown decoding option {', '.join(unknown)}{hint}; known: {', '.join(known)}")


def check_logit_bias(bias: Mapping[int, float] | Tensor | None) -> None:
    """Raise unless `bias` is None, a float tensor `[V]`, or a mapping from ids to numbers, without NaN and +inf."""
    if isinstance(bias, Tensor):
        fits = bias.dim() == 1 and bias.is_floating_point()
        if not fits or bool((bias.isnan() | (bias == torch.inf)).any()):
            kind = f"{bias.dtype} of shape {list(bias.shape)}" + (" with NaN or +inf in it" if fits else "")
            raise ValueError(f"logit_bias must be a float tensor [V] without NaN or +inf; got {kind}")
    elif bias is not None and not (
        isinstance(bias, Mapping)
        and all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in bias)
        and all(isinstance(x, numbers.Real) and -math.inf <= x < math.inf for x in bias.values())
    ):
        raise ValueError(f"logit_bias must be {{id: number}} or a float tensor [V], without NaN or +inf; got {bias!r}")


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that a decoding needs, from the configuration or, failing that, from the model.

    Attributes
    ----------
    mask : int
        The mask token; -1 for models without one.
    eos : list of int
        The end tokens; may be empty.
    pad : int
        The token that fills an answer after its end token.
    banned : list of int
        Tokens that are never proposed: the mask token, `suppress_token_ids`, and ids unknown to the tokenizer.
    padding : int, optional
        The token that pads shorter prompts on the left. None if neither configuration nor model names it.
    padding_is_content : bool
        Whether `padding` has another meaning too (an end token, say), so that a prompt may contain it.
    """

    mask: int
    eos: list[int]
    pad: int
    banned: list[int]
    padding: int | None = None
    padding_is_content: bool = False
