# SPDX-License-Identifier: Apache-2.0
"""Score answers: exact likelihoods for causal models and for single tokens, else a lower bound with its error."""

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

#: Fields of `DecodingConfig` that describe the model rather than the decoding.
OF_THE_MODEL = (
    "mask_token_id", "pad_token_id", "logit_alignment", "attention", "block_grid", "seeded", "block_length",
)  # fmt: skip

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of an answer.

    Attributes
    ----------
    total : float
        ln p(answer | prompt) in nats, or an estimate of a lower bound on it.
    standard_error : float
        Standard error of the estimate; 0 if `total` is exact, NaN if it comes from a single sample.
    is_exact : bool
        Whether `total` is exact.
    is_greedy : bool
        Whether greedy decoding, one token per forward, gives the answer.
    forwards : int
        Number of sequences that were passed through the model.
    """

    total: float
    standard_error: float
    is_exact: bool
    is_greedy: bool
    forwards: int


class Look:
    """Logits processor that only records the log probabilities of the tokens in `wanted` and the most likely token."""

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
    model : DiffusionModel
    special : SpecialTokens
        Special tokens of the model.
    settings : Settings
    config : DecodingConfig
        The fully resolved configuration (see `decoding.resolve`).

    Raises
    ------
    ValueError
        If `settings.likelihood` is "left-to-right" and the model does not use mask tokens.
    """

    def __init__(
        self, model: DiffusionModel, special: SpecialTokens, settings: Settings, config: DecodingConfig
    ):  # fmt: skip
        self.model, self.special, self.settings = model, special, settings
        self.block_length = config.block_length if config.attention == "block" else None
        family = model.family
        self.looks_at_logits = family.noise == "mask" and family.name != "sedd"
        self.method = settings.likelihood
        # A bound is known if masks are seen from both sides and predicted at their own position. Other models are
        # scored token by token.
        has_bound = family.attention == "full" or (
            family.attention == "block" and config.logit_alignment == "same" and not config.seeded
        )
        if self.method is None and self.looks_at_logits and not has_bound:
            self.method = LEFT_TO_RIGHT
        if self.method == LEFT_TO_RIGHT and not self.looks_at_logits:
            raise ValueError(f"likelihood=left-to-right needs a model with mask tokens; got family '{family.name}'")
        self._engine: Engine | None = None

    def score(self, pairs: Sequence[Pair], is_quiet: bool = True) -> list[Likelihood]:
        """Score answers given their prompts.

        Parameters
        ----------
        pairs : sequence
            Token ids of prompts and answers, each of at least one token.
        is_quiet : bool
            Whether to hide the progress bar.

        Returns
        -------
        list of Likelihood
            In the order of `pairs`.
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
        """An engine for greedy decoding, one token per forward, regardless of the settings for generation."""
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
        """Get the model's prediction after every prefix of the answers. Equal prefixes share a forward."""
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
        """Decode greedily after each prompt. Answers with the same prompt and length share one decoding."""
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
                raise RuntimeError(f"could not compute a likelihood: {output.error}")
            found[output.request_id] = output.generated_tokens
        return found

    def _bound(self, pair: Pair, is_greedy: bool) -> Likelihood:
        prompt, answer = (torch.tensor([ids], device=self.model.device) for ids in pair)
        options = {n: v for n, v in self.settings.options.items() if n in ("mask_token_id", "logit_alignment")}
        if self.model.family.attention == "block" and "block_length" in self.settings.options:
            options["block_length"] = self.settings.options["block_length"]
        # All answers to a question share one seed, so that answers of equal length get the same random masks.
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
    """Combine the predictions after every prefix into the exact likelihood of an answer."""
    prompt, answer = pair
    at = [looks[prompt + answer[:i]] for i in range(len(answer))]
    total = math.fsum(look.logp[token] for look, token in zip(at, answer))
    is_greedy = all(look.best == token for look, token in zip(at, answer))
    return Likelihood(total, 0.0, True, is_greedy, len(answer))
