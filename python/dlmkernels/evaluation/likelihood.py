# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of answers: exact where the answer is one token or the model causal, else a bound with its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..decoding.config import DecodingConfig, SpecialTokens
from ..decoding.likelihood import log_likelihood
from ..decoding.rules import Quota
from ..engine import Engine
from ..models.adapt import DiffusionModel
from .arguments import LEFT_TO_RIGHT, Settings
from .generation import seed_of

#: Fields that say what the model is, and not how it is decoded.
OF_THE_MODEL = (
    "mask_token_id", "pad_token_id", "logit_alignment", "attention", "block_grid", "seeded", "block_length",
)  # fmt: skip

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Likelihood:
    """What is known of an answer's likelihood.

    Attributes
    ----------
    total : float
        ln p(answer | prompt), or an estimate of a lower bound on it.
    standard_error : float
        Of the estimate; 0 where `total` is exact, NaN for a single sample.
    is_exact : bool
    is_greedy : bool
        Whether greedy decoding, one token a forward, gives the answer.
    forwards : int
        Sequences that were forwarded for it.
    """

    total: float
    standard_error: float
    is_exact: bool
    is_greedy: bool
    forwards: int


class Look:
    """A logits processor that changes nothing: it notes the log-probabilities of some tokens, and the likeliest."""

    def __init__(self, mask: int):
        self.mask = mask
        self.wanted: set[int] = set()
        self.logp: dict[int, float] = {}
        self.best = -1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        z = scores[-1].double()
        if self.mask >= 0:
            z = z.index_fill(0, torch.tensor([self.mask], device=z.device), -torch.inf)
        logp = z.log_softmax(0)
        self.logp = {token: float(logp[token]) for token in self.wanted}
        self.best = int(logp.argmax())
        return scores


class Scorer:
    """Scores answers with one model.

    Parameters
    ----------
    model, special
        As of a decoding.
    settings : Settings
    config : DecodingConfig
        What the model's family says about a decoding, with nothing left open (see `decoding.resolve`).
    """

    def __init__(
        self, model: DiffusionModel, special: SpecialTokens, settings: Settings, config: DecodingConfig
    ):  # fmt: skip
        self.model, self.special, self.settings = model, special, settings
        self.block_length = config.block_length if config.attention == "block" else None
        family = model.family
        self.looks_at_logits = family.noise == "mask" and family.name != "sedd"
        self.method = settings.likelihood
        # bounds are known for masks seen from both sides, each scored in its own place; the rest goes token by token
        has_bound = family.attention == "full" or (
            family.attention == "block" and config.logit_alignment == "same" and not config.seeded
        )
        if self.method is None and self.looks_at_logits and not has_bound:
            self.method = LEFT_TO_RIGHT
        if self.method == LEFT_TO_RIGHT and not self.looks_at_logits:
            raise ValueError(f"likelihood=left-to-right is for models that know masks; not for family '{family.name}'")
        self._engine: Engine | None = None

    def score(self, pairs: Sequence[Pair], is_quiet: bool = True) -> list[Likelihood]:
        """Likelihoods of answers, given their prompts, in the same order.

        Parameters
        ----------
        pairs : sequence
            Ids of prompts and answers; both of at least one token.
        is_quiet : bool
            Whether no progress is shown.
        """
        is_exact = [self.looks_at_logits and (len(a) == 1 or self.method == LEFT_TO_RIGHT) for _, a in pairs]
        looks = self._conditionals(pair for pair, exact in zip(pairs, is_exact) if exact)
        greedy = self._greedy(pair for pair, exact in zip(pairs, is_exact) if not exact)
        return [
            _chain(pair, looks) if exact else self._bound(pair, greedy.get((pair[0], len(pair[1]))) == pair[1])
            for pair, exact in tqdm(list(zip(pairs, is_exact)), disable=is_quiet, desc="likelihood")
        ]

    @property
    def engine(self) -> Engine:
        """An engine that decodes greedily, one token a forward, whatever the arguments say about generation."""
        if self._engine is None:
            options: dict[str, Any] = {n: v for n, v in self.settings.options.items() if n in OF_THE_MODEL}
            if self.model.family.attention == "reordered":
                options["cache"] = "none"
            elif self.model.family.attention in ("block", "causal-context"):
                options["cache"] = "block"
            self._engine = Engine(
                self.model, slots=self.settings.slots, max_length=self.settings.max_length, rule=Quota(),
                eos_policy="none", deterministic=self.settings.deterministic, reserve=False, **options,
            )  # fmt: skip
        return self._engine

    def _conditionals(self, pairs: Iterable[Pair]) -> dict[tuple[int, ...], Look]:
        """What the model says of the token behind each prefix; answers with the same prefix share a forward."""
        looks: dict[tuple[int, ...], Look] = {}
        for prompt, answer in pairs:
            for i, token in enumerate(answer):
                looks.setdefault(prompt + answer[:i], Look(self.special.mask)).wanted.add(token)
        names = [
            self.engine.add_request(list(prefix), max_new_tokens=1, seed=0, logits_processor=look)
            for prefix, look in looks.items()
        ]  # fmt: skip
        self._finished(names)
        return looks

    def _greedy(self, pairs: Iterable[Pair]) -> dict[tuple[tuple[int, ...], int], tuple[int, ...]]:
        """What is decoded behind each prompt at each length; answers of the same length share it."""
        if not (self.settings.check_greedy and self.looks_at_logits):
            return {}
        keys = list(dict.fromkeys((prompt, len(answer)) for prompt, answer in pairs))
        names = [self.engine.add_request(list(prompt), max_new_tokens=length, seed=0) for prompt, length in keys]
        found = self._finished(names)
        return {key: tuple(found[name]) for key, name in zip(keys, names)}

    def _finished(self, names: Sequence[str]) -> dict[str, list[int]]:
        found = {}
        for output in self.engine if names else ():
            if output.error is not None:
                raise RuntimeError(f"a likelihood could not be computed: {output.error}")
            found[output.request_id] = output.generated_tokens
        return found

    def _bound(self, pair: Pair, is_greedy: bool) -> Likelihood:
        prompt, answer = (torch.tensor([ids], device=self.model.device) for ids in pair)
        options = {n: v for n, v in self.settings.options.items() if n in ("mask_token_id", "logit_alignment")}
        if self.model.family.attention == "block" and "block_length" in self.settings.options:
            options["block_length"] = self.settings.options["block_length"]
        # the answers to one question have one seed, so that those of one length are masked alike
        seed = seed_of(self.settings.seed, "likelihood", *pair[0])
        with torch.inference_mode():
            out = log_likelihood(
                self.model, prompt, answer, method=self.method, num_samples=self.settings.mc_num, seed=seed,
                batch_size=self.settings.likelihood_batch, **options,
            )  # fmt: skip
        is_exact = self.block_length == 1
        error = 0.0 if is_exact else float(out.standard_error[0])
        return Likelihood(float(out.total[0]), error, is_exact, is_greedy, out.num_forwards)


def _chain(pair: Pair, looks: dict[tuple[int, ...], Look]) -> Likelihood:
    """The likelihood of an answer from those of its tokens, each given all before it."""
    prompt, answer = pair
    at = [looks[prompt + answer[:i]] for i in range(len(answer))]
    total = math.fsum(look.logp[token] for look, token in zip(at, answer))
    is_greedy = all(look.best == token for look, token in zip(at, answer))
    return Likelihood(total, 0.0, True, is_greedy, len(answer))
