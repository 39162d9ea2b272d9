# SPDX-License-Identifier: Apache-2.0
"""Everything that can be chosen about a decoding, checked before anything runs."""

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
    """Check of one id or several, or of several for each request; which ids there are only the model knows."""
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
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a token id, an integer; got {value!r}")
    return value


def _optional_token_id(name: str, value: Any) -> Any:
    return None if value is None else _token_id(name, value)


def _seed(name: str, value: Any) -> int | Tensor | None:
    """Check of a seed: one number, or one for each request."""
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


#: what each field that is no object may be
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


#: The rule of a configuration that names none: as many tokens a forward as the model is sure of. On the demonstration's
#: tasks it solves what one token a forward solves, within noise, in 3 to 17 tokens a forward (docs/decoding.md).
DEFAULT_RULE: Rule = Threshold(0.95)
#: The same where `steps` is given: the user has said how many forwards there are.
FIXED_RULE: Rule = Quota()


@dataclass(frozen=True, eq=False, kw_only=True)
class OfTheFamily:
    """What the model's family says of a decoding: None leaves it to that.

    Attributes
    ----------
    mask_token_id, eos_token_id, pad_token_id : int
        Taken from the model's configuration when None. Several eos ids may be given; a sequence of sequences has
        those of each request.
    logit_alignment : {"same", "shift"}, optional
        Whether row i of the logits predicts position i (same) or i + 1 (shift). None: as the model's family.
    attention : {"full", "block", "causal", "causal-context", "reordered"}, optional
        What a position sees (see `models.families.Family`). None: as the model's family.
    block_grid : {"absolute", "prompt", "both-ways"}, optional
        Where the blocks of attention="block" are counted from (see `models.families.Family`). None: what the model's
        family does.
    seeded : bool, optional
        Whether a block's first token is what the row before it predicts, committed before the block's first step.
        None: what the model's family does.
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
    """What is there for the rules that ask for it: see `Rule.uses_steps` and `Rule.ignores`.

    Attributes
    ----------
    steps : int, optional
        Forwards of the whole generation, for rules with a fixed schedule (`Quota`, `TimeQuota`), divided evenly among
        the blocks; what is left over goes to the first blocks, one each. None: one forward a token. Adaptive rules take
        as many as they need.
    score : {"probability", "margin", "entropy", "random", "position"} or Score
        What orders the positions: probability of the proposal, gap between the two best probabilities, negative
        entropy, chance, left to right, or a score of `dlmkernels.scores`.
    order_temperature : float
        Above 0 the order is drawn at random, position i with weight exp(score / order_temperature).
    defer_token_ids : sequence of int
        Positions where one of these is proposed come last, whatever their score.
    """

    steps: int | None = None
    score: str | Score = "probability"
    order_temperature: float = 0.0
    defer_token_ids: Sequence[int] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingConfig(OfTheFamily, OfTheRule, ComparedByValue):
    """How to decode. Every field is also a keyword of `generate` and `infill`.

    Numbers may be Python's, numpy's, or tensors of one value; where several are wanted, any sequence of them. What you
    set has to have an effect in the decoding: an option that has none with the rule, the cache and the attention in use
    is refused by name. The fields of a preset need not.

    What a user chooses is below; what the model's family says, and what belongs to some rules, is in the two bases.

    Attributes
    ----------
    max_new_tokens : int or sequence of int
        Tokens generated after the prompt; at most so many with the rules that change the length. A sequence has one
        number for each request: each is decoded as it is alone with its own.
    block_length : int, optional
        Blocks are decoded left to right, each until it has no mask left. None: the length of the blocks the model
        was trained with, where its attention has blocks; else one block.
    sub_block_length : int, optional
        A block is decoded in parts of this length, left to right, each seeing the whole block (Fast-dLLM v2,
        arXiv:2509.26328).
    rule : Rule, optional
        Which positions a step commits. None: `DEFAULT_RULE`, which commits all tokens the model is sure of; or, where
        `steps` is given, `Quota()`, which takes exactly that many forwards.
    temperature : float or sequence of float
        0: the most likely token; otherwise Gumbel-max sampling at this temperature. A sequence has one for each
        request; so it is with `top_k` and `top_p`, and with the thresholds of rules.
    top_k, top_p : int, float, or sequence of them
        Filters of the sampled distribution; 0 and 1 switch them off.
    top_p_first, keep_crossing : bool
        Order of the filters, and whether the token that crosses `top_p` stays (see `ops.token_confidence`).
    distribution : {"raw", "tempered", "filtered"}
        Which distribution the scores are read from: before temperature, after it, or after the filters.
    cache : {"none", "prefix", "dual", "delayed", "block"} or FeatureCache
        KV reuse. none: every forward takes the whole canvas (exact). prefix: keys and values left of the block are
        kept from the block's first forward. dual: also those right of it; a forward then takes the block alone
        (Fast-dLLM, arXiv:2505.22618). delayed: those of a token are kept from the forward after it was decided; a
        forward takes what is open and what the last step decided (dKV-Cache, arXiv:2505.15781; with shifted logits, the
        rows that speak of it). dllm-cache, sparse-dllm, d2cache: see `DLLMCache`, `SparseCache`, `D2Cache`. All are
        approximations, for models with full attention; with the rule `EntropyPipeline`, prefix is d3LLM's. block: for
        the other kinds, under which a finished block never changes again: it is appended once and a forward takes the
        open block alone (exact). focus: the same with less work in a block (an approximation, see `FocusCache`).
    sub_block_cache : bool
        With cache="block" and a `sub_block_length`: a forward takes the part alone, and finds what the rest of the
        block was when the part was begun (Fast-dLLM v2; an approximation).
    warmup : int
        With the caches that are approximations: how many forwards of the whole canvas a block begins with; of the whole
        block a part, with `sub_block_cache`.
    refresh_interval : int, optional
        With them: every so many forwards of a block (or part), one is like the first. None: none is.
    vicinity : tuple of int
        With cache="prefix" and "dual": positions left and right of the block that a forward takes, too (dInfer,
        arXiv:2510.08666).
    fuse_commit : bool
        With cache="block": append a finished block in the same forward that takes the next block's first step, which
        saves a forward a block. It cannot be where the next block's first token comes from the finished one
        (`seeded`), nor with attention="causal-context".
    seed : int or Tensor, optional
        What a request's random draws depend on, whatever batch it is in. An int is every request's seed (equal
        requests then give equal results), an int64 tensor `[B]` one for each; None draws them from torch's generator.
    cfg_scale : float
        Classifier-free guidance: logits u + (cfg_scale + 1)(c - u), u from a canvas whose given tokens are masked.
        Doubles the work.
    suppress_token_ids : sequence of int
        Never generated. The mask token never is.
    constraint : Constraint or Tensor, optional
        What the tokens must obey. A tensor says which tokens are allowed: bool `[V]`, or an int32 bitmask
        `[ceil(V / 32)]` (bit v % 32 of word v // 32), for all positions; `[N, …]` or `[B, N, …]`, one for each of the N
        = `max_new_tokens` positions of an answer (`infill`: of the canvas), B and N being that or 1. Fewer than V are
        those of the first tokens, and the others are not allowed. Not with rules that insert or remove tokens, nor
        with a `Strided` that tests drafts by a ratio.
    logit_bias : dict or Tensor, optional
        Added to the logits of every position: `{id: value}`, or a float tensor `[V]`. It is added to the guided logits
        (after `cfg_scale`) and before temperature and filters. The model's distribution is the biased one for all that
        follows: confidences, margins and entropies are read from it, whatever `distribution` is.
    eos_policy : {"none", "fill", "block"}
        fill: once an end token stands with nothing open before it, the rest of the request becomes padding and the
        request is done. block: the same, but only when its block is finished, as must be with rules that take
        committed tokens back. none: the full length is decoded.
    lm_head : {"auto", "fused", "logits", "sharded"}
        What the head's results come from. logits: the model's head and `ops.token_confidence`. fused:
        `ops.lm_head_confidence`, which makes no logits. sharded: `ops.shard_confidence` of each rank's part of a
        tensor-parallel model's vocabulary. Both are an error where they cannot be. auto: one of them where it can be
        and is no slower (`decoding.head`). They round differently: a near tie may fall differently.
    logits_budget : int
        Bytes that the logits of a step may take; rows are taken in slices where all of them would take more. Where
        logits have to be kept for longer than a moment, this is exceeded (docs/memory.md says where).
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
            raise ValueError("constraint must have a dimension of tokens; got a tensor of shape []")
        if self.constraint is not None and not isinstance(self.constraint, (Constraint, Tensor)):
            raise TypeError(f"constraint must be a Constraint or a tensor; got {self.constraint!r}")
        normalize(self, LIMITS)
        self._ask(f.name for f in dataclasses.fields(self))

    @property
    def asked(self) -> frozenset[str]:
        """Fields that whoever made this configuration has set to something else than their default.

        Each of them must have an effect in the decoding (see `effects`). Those of a preset are not among them: what a
        decoder was published with may lie idle with another model, or beside what is changed.
        """
        return self.__dict__["_asked"]

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, and not the likeliest ones taken, in any request."""
        return any(t > 0 for t in each(self.temperature)) or self.rule.temperature(0, 1) is not None

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p leave something out, in any request."""
        return any(k > 0 for k in each(self.top_k)) or any(p < 1 for p in each(self.top_p))

    @property
    def longest(self) -> int:
        """`max_new_tokens` of the request that may get most."""
        return max(each(self.max_new_tokens))

    def replace(self, **changes) -> DecodingConfig:
        """A copy with some fields changed; an unknown field is a TypeError that lists the known ones.

        A rule that nobody has named is chosen anew: `steps` alone asks for a fixed schedule.
        """
        check_names(changes)
        if "steps" in changes and any(self.rule is rule for rule in (DEFAULT_RULE, FIXED_RULE)):
            changes = {"rule": None} | changes
        new = dataclasses.replace(self, **changes)
        new._ask(self.asked | set(changes))
        return new

    def as_preset(self) -> DecodingConfig:
        """A copy of which no field has been asked for."""
        new = dataclasses.replace(self)
        new._ask(())
        return new

    def _ask(self, names: Iterable[str]) -> None:
        asked = frozenset(name for name in names if not equal(getattr(self, name), _default(name)))
        object.__setattr__(self, "_asked", asked)


def _default(name: str) -> Any:
    """Default value of a field."""
    return DEFAULT_RULE if name == "rule" else DecodingConfig.__dataclass_fields__[name].default


def check_names(options: Iterable[str]) -> None:
    """Raise a TypeError unless all of them are names of fields."""
    known = DecodingConfig.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        hint = "".join(f"; {text}" for name, text in ELSEWHERE.items() if name in unknown)
        raise TypeError(f"unknown decoding option {', '.join(unknown)}{hint}; known: {', '.join(known)}")


def check_logit_bias(bias: Mapping[int, float] | Tensor | None) -> None:
    """Raise unless `bias` is None, a float tensor `[V]` or a mapping from ids to numbers; none of them NaN or +inf."""
    if isinstance(bias, Tensor):
        if bias.dim() != 1 or not bias.is_floating_point() or bool((bias.isnan() | (bias == torch.inf)).any()):
            raise ValueError(
                "logit_bias must be a float tensor [V] of numbers below infinity; got "
                f"{bias.dtype} of shape {list(bias.shape)}" + ("" if bias.dim() != 1 else " with NaN or inf in it")
            )
    elif bias is not None and not (
        isinstance(bias, Mapping)
        and all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in bias)
        and all(isinstance(x, numbers.Real) and -math.inf <= x < math.inf for x in bias.values())
    ):
        raise ValueError(f"logit_bias must be {{token id: number below infinity}} or a tensor [V]; got {bias!r}")


@dataclass(frozen=True)
class SpecialTokens:
    """The ids a decoding needs, all known: from the configuration, else from the model.

    Attributes
    ----------
    mask : int
        -1 for models that have none.
    eos : list of int
        May be empty.
    pad : int
        What follows an end token.
    banned : list of int
        Never proposed: the mask, what was asked for, and ids that the tokenizer does not know.
    padding : int, optional
        What stands left of shorter prompts; None where neither the configuration nor the model says so.
    padding_is_content : bool
        Whether `padding` has another meaning too, so that it may be part of a prompt (it is an end token, say).
    """

    mask: int
    eos: list[int]
    pad: int
    banned: list[int]
    padding: int | None = None
    padding_is_content: bool = False
