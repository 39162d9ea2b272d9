# SPDX-License-Identifier: Apache-2.0
"""Samplers of continuous models: what is decoded are noisy vectors, one a position, and tokens are read off at the end.

A step takes the vectors z and what the model makes of them, the mean x of what they come from, to ``z' = a z + b x +
c n`` with normal numbers n. A rule says which noise levels are walked through, and a, b and c of each step; the model
says what its noise levels are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import Check, flag, number
from .base import OF_THE_HEAD, SHARE, Rule

#: Fields of a configuration about the order and the sampling of tokens, and about blocks.
UNUSED = frozenset((
    "score", "order_temperature", "defer_token_ids", "temperature", "top_k", "top_p", "top_p_first", "keep_crossing",
    "distribution", "block_length", "sub_block_length", "sub_block_cache",
)) | OF_THE_HEAD  # fmt: skip


class Walk(NamedTuple):
    """The noise levels of N forwards, and what happens after each but the last.

    Attributes
    ----------
    time : Tensor
        float64 `[N]`, of `[0, 1]`.
    weights : Tensor
        float64 `[N, 3]`: a, b and c of the step after each forward; the last row has no meaning.
    first : Tensor
        float64 `[2]`: what the vectors of given tokens, and noise, are multiplied by before the first forward.
    """

    time: Tensor
    weights: Tensor
    first: Tensor


@dataclass(frozen=True)
class ContinuousRule(Rule):
    """Base of the samplers of continuous models.

    Attributes
    ----------
    clean_context : bool
        Whether given tokens are vectors without noise at all times; False: they have as much noise as the others.
    clamps : bool
        Whether what the model says is moved to the nearest vector of a token. For models that say vectors.
    """

    clean_context: ClassVar[bool] = False
    clamps: ClassVar[bool] = False
    by_block: ClassVar[bool] = False
    noise: ClassVar[str] = "continuous"
    draws: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def uses_steps(self) -> bool:
        return True

    @property
    def ignores(self) -> frozenset[str]:
        return UNUSED

    def check_task(self, config: Any, prompt_embeds: Tensor | None) -> None:
        """Refuse what has no meaning where vectors are decoded."""
        for name, is_asked in (
            ("cfg_scale", config.cfg_scale > 0), ("constraint", config.constraint is not None),
            ("inputs_embeds", prompt_embeds is not None), ("cache", config.cache != "none"),
        ):  # fmt: skip
            if is_asked:
                raise ValueError(f"{name} cannot be used with rule {type(self).__name__}")

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        """The plan of `steps` forwards; `gamma` gives the model's noise levels at times of `[0, 1]`, float64."""
        raise NotImplementedError


def signal(gamma: Tensor) -> Tensor:
    """alpha of ``z = alpha x + sigma n``, by the logarithm gamma of sigma^2 / alpha^2, where both squares sum to 1."""
    return torch.sigmoid(-gamma).sqrt()


def toward(gamma: Tensor) -> Tensor:
    """Weights `[N, 3]` of the steps along z = alpha x + sigma n with the noise n that z and x imply."""
    now, then = gamma, torch.cat((gamma[1:], gamma[-1:]))
    kept = signal(-then) / signal(-now)
    return torch.stack((kept, signal(then) - kept * signal(now), torch.zeros_like(now)), 1)


@dataclass(frozen=True)
class EmbeddingFlow(ContinuousRule):
    """The probability flow of LangFlow (arXiv:2604.11748): no chance but the first noise.

    N forwards at gamma of N quantiles, evenly spaced from 1 - eps to eps. Each says a mean embedding x, and z moves on
    the line of its noise: ``z' = alpha' x + sigma' (z - alpha x) / sigma``. The tokens are the likeliest of the last.
    """

    limits: ClassVar[Mapping[str, Check]] = {"eps": number(0.0, 0.5, above=True)}

    eps: float = 1e-5

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        # in float32, as the published program has them
        q = torch.linspace(1.0 - self.eps, self.eps, steps, device=device, dtype=torch.float32)
        levels = gamma(q.double()).float().double()
        return Walk(q.double(), toward(levels), torch.stack((signal(levels[0]), signal(-levels[0]))))


@dataclass(frozen=True)
class LearnedNoise(ContinuousRule):
    """The sampler of Plaid (Gulrajani and Hashimoto, arXiv:2305.18619) along a noise schedule that was learnt.

    N + 1 forwards: at N times evenly spaced from 1 to 0, and again at 0. Each of the first N - 1 is followed by a step
    of 1 / N; at time 0 nothing moves, and the last forward decides. gamma is the model's own function of the time. The
    noise that x implies is divided by `score_temperature`, which moves x away from z.
    Then, with c = 1 - exp(gamma' - gamma), ``z' = alpha' / alpha (1 - c) z + c alpha' x + sqrt(c (1 - alpha'^2)) n``;
    with ``ddim`` as in `EmbeddingFlow`.
    """

    limits: ClassVar[Mapping[str, Check]] = {"score_temperature": number(0.0, above=True), "ddim": flag}

    score_temperature: float = 0.9
    ddim: bool = False

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        count = max(steps - 1, 1)
        t = torch.linspace(1.0, 0.0, count, device=device, dtype=torch.float64)
        t = torch.cat((t, torch.zeros_like(t[:1])))[:steps]
        now, then = gamma(t), gamma((t - 1 / count).clamp(min=0))
        alpha, alpha_then = signal(now), signal(then)
        if self.ddim:
            kept = signal(-then) / signal(-now)
            a, b, c = kept, alpha_then - kept * alpha, torch.zeros_like(now)
        else:
            share = -torch.expm1(then - now)
            a, b = (1 - share) * alpha_then / alpha, share * alpha_then
            c = (share * (1 - alpha_then**2)).sqrt()
        # x is made of what the model says and of z
        inverse = 1 / self.score_temperature
        weights = torch.stack((a + b * (1 - inverse) / alpha, b * inverse, c), 1)
        rests = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        weights = torch.where((t > 0)[:, None], weights, rests)
        return Walk(t, weights, torch.stack((signal(now[0]), signal(-now[0]))))


@dataclass(frozen=True)
class VectorDenoising(ContinuousRule):
    """The samplers of Diffusion-LM (Li et al., arXiv:2205.14217), whose model says clean vectors and not logits.

    N forwards at N of the steps that the model was trained with, evenly spaced, the last and the first among them. What
    the model says, x, is moved to the nearest vector of a token (`clamp`). Then z is drawn from what it was one step
    before, given x and z now (DDPM's posterior). With `eta` the step is DDIM's, whose noise is `eta` times that of the
    posterior. The tokens are read off the last x. Given tokens have no noise at any time.
    """

    clean_context: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {"clamp": flag, "eta": number(0.0, 1.0, optional=True)}

    clamp: bool = True
    eta: float | None = None

    @property
    def clamps(self) -> bool:  # type: ignore[override]
        return self.clamp

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        t = torch.linspace(1.0, 0.0, steps, device=device, dtype=torch.float64)
        kept = torch.sigmoid(-gamma(t))
        before = torch.cat((kept[1:], torch.ones_like(kept[:1])))
        if self.eta is None:
            share = 1 - kept / before
            a = (1 - before) * (1 - share).sqrt() / (1 - kept)
            b = share * before.sqrt() / (1 - kept)
            c = (share * (1 - before) / (1 - kept)).sqrt()
        else:
            c = self.eta * ((1 - before) / (1 - kept) * (1 - kept / before)).sqrt()
            a = ((1 - before - c**2).clamp(min=0) / (1 - kept)).sqrt()
            b = before.sqrt() - a * kept.sqrt()
        return Walk(t, torch.stack((a, b, c), 1), torch.tensor([1.0, 0.0], dtype=torch.float64, device=device))


@dataclass(frozen=True)
class SimplexDenoising(ContinuousRule):
    """The sampler of SSD-LM (Han, Kumar and Tsvetkov, arXiv:2210.17432), block after block.

    A position is a vector of V numbers, at first K times noise. Each forward says logits; the tokens of their nucleus
    become K, all others -K, and as much noise is put on that as one step less has. A block takes its share of `steps`,
    and its tokens are the likeliest of its last forward.

    Attributes
    ----------
    nucleus : float
        Probability of the tokens that become K: the likeliest that sum to it, the one that crosses it included.
    draw : bool
        Whether one token of the nucleus, drawn by its probability, becomes K, and not all of them: the second of the
        published programs (`ssd_model_decode_alt.py`).
    """

    limits: ClassVar[Mapping[str, Check]] = {"nucleus": SHARE, "draw": flag}

    nucleus: float = 0.2
    draw: bool = False

    @property
    def ignores(self) -> frozenset[str]:
        return UNUSED - {"block_length"}
