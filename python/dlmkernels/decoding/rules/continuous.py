# SPDX-License-Identifier: Apache-2.0
"""Samplers of continuous models, which decode one noisy vector per position and turn vectors into tokens at the end.

A step takes the vectors z and the model's estimate x of the noise-free vectors to ``z' = a z + b x + c n``, with
standard normal numbers n. The rule defines the sequence of times and each step's a, b and c. The model defines the
noise level at each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import Check, flag, number
from .base import OF_THE_HEAD, SHARE, Rule

#: `DecodingConfig` fields on the order and the sampling of tokens, on blocks, and on the LM head.
UNUSED = frozenset((
    "score", "order_temperature", "defer_token_ids", "temperature", "top_k", "top_p", "top_p_first", "keep_crossing",
    "distribution", "block_length", "sub_block_length", "sub_block_cache",
)) | OF_THE_HEAD  # fmt: skip


class Walk(NamedTuple):
    """The times of N forward passes, and the step after each of them except the last.

    Attributes
    ----------
    time : Tensor
        float64 `[N]`, values in `[0, 1]`.
    weights : Tensor
        float64 `[N, 3]`: a, b and c of the step after each forward pass. The last row is meaningless.
    first : Tensor
        float64 `[2]`: factors of the given tokens' vectors and of the noise added to them before the first forward
        pass.
    """

    time: Tensor
    weights: Tensor
    first: Tensor


@dataclass(frozen=True)
class ContinuousRule(Rule):
    """Base class of the samplers of continuous models.

    Attributes
    ----------
    clean_context : bool
        Whether the vectors of given tokens are free of noise at all times. If False, they are as noisy as the others.
    clamps : bool
        Whether the model's prediction is moved to the nearest token vector. For models that predict vectors.
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
        """Raise a ValueError for options that are meaningless when vectors are decoded."""
        for name, is_asked in (
            ("cfg_scale", config.cfg_scale > 0), ("constraint", config.constraint is not None),
            ("inputs_embeds", prompt_embeds is not None), ("cache", config.cache != "none"),
        ):  # fmt: skip
            if is_asked:
                raise ValueError(f"{name} cannot be used with rule {type(self).__name__}")

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        """Plan `steps` forward passes; `gamma` maps times in `[0, 1]`, float64, to the model's noise levels."""
        raise NotImplementedError


def signal(gamma: Tensor) -> Tensor:
    """Return alpha of ``z = alpha x + sigma n`` for ``gamma = ln(sigma^2 / alpha^2)``, with alpha^2 + sigma^2 = 1."""
    return torch.sigmoid(-gamma).sqrt()


def toward(gamma: Tensor) -> Tensor:
    """Return the weights `[N, 3]` of steps along z = alpha x + sigma n, keeping the noise n implied by z and x."""
    now, then = gamma, torch.cat((gamma[1:], gamma[-1:]))
    kept = signal(-then) / signal(-now)
    return torch.stack((kept, signal(then) - kept * signal(now), torch.zeros_like(now)), 1)


@dataclass(frozen=True)
class EmbeddingFlow(ContinuousRule):
    """Probability flow of LangFlow (arXiv:2604.11748): deterministic apart from the initial noise.

    N forward passes run at gamma of N quantiles, evenly spaced from 1 - eps to eps. Each predicts a mean embedding x,
    and z moves along the line of its noise: ``z' = alpha' x + sigma' (z - alpha x) / sigma``. The last forward pass
    decides: each position takes its most likely token.
    """

    limits: ClassVar[Mapping[str, Check]] = {"eps": number(0.0, 0.5, above=True)}

    eps: float = 1e-5

    def walk(self, gamma: Callable[[Tensor], Tensor], steps: int, device: torch.device) -> Walk:
        # in float32, as in the published program
        q = torch.linspace(1.0 - self.eps, self.eps, steps, device=device, dtype=torch.float32)
        levels = gamma(q.double()).float().double()
        return Walk(q.double(), toward(levels), torch.stack((signal(levels[0]), signal(-levels[0]))))


@dataclass(frozen=True)
class LearnedNoise(ContinuousRule):
    """Sampler of Plaid (Gulrajani and Hashimoto, arXiv:2305.18619), along a learned noise schedule.

    N + 1 forward passes run at N times evenly spaced from 1 to 0, and once more at 0. Each of the first N - 1 is
    followed by a step of size 1 / N. At time 0 nothing moves, and the last forward pass decides the tokens. gamma is
    the model's own function of time. The noise implied by x is divided by `score_temperature`, so that values below 1
    move x away from z. With c = 1 - exp(gamma' - gamma), the step is then
    ``z' = alpha' / alpha (1 - c) z + c alpha' x + sqrt(c (1 - alpha'^2)) n``. With ``ddim``, it is the deterministic
    step of `EmbeddingFlow`.
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
        # x combines the model's prediction and z
        inverse = 1 / self.score_temperature
        weights = torch.stack((a + b * (1 - inverse) / alpha, b * inverse, c), 1)
        rests = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        weights = torch.where((t > 0)[:, None], weights, rests)
        return Walk(t, weights, torch.stack((signal(now[0]), signal(-now[0]))))


@dataclass(frozen=True)
class VectorDenoising(ContinuousRule):
    """Samplers of Diffusion-LM (Li et al., arXiv:2205.14217), whose model predicts clean vectors instead of logits.

    N forward passes run at N of the model's training steps, evenly spaced and including the last and the first. The
    prediction x is moved to the nearest token vector (`clamp`). Then z is drawn from the posterior one step earlier,
    given x and the current z (DDPM). With `eta`, the step is DDIM's, with `eta` times the noise of that posterior. The
    tokens are read from the last x. Given tokens are free of noise at all times.
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
    """Sampler of SSD-LM (Han, Kumar and Tsvetkov, arXiv:2210.17432), block after block.

    Each position is a vector of V numbers (the vocabulary size), initially K times noise, where K is the model's
    `simplex_scale`. Each forward pass predicts logits. The tokens of their nucleus are set to K and all others to -K,
    and noise is added to the level of the next step. Each block takes its share of `steps`, and its tokens are the most
    likely ones of its last forward pass.

    Attributes
    ----------
    nucleus : float
        Probability mass of the tokens set to K: the most likely tokens up to and including the one that reaches it.
    draw : bool
        If True, only one token of the nucleus, drawn by probability, is set to K instead of all of them. This is the
        second published program (`ssd_model_decode_alt.py`).
    """

    limits: ClassVar[Mapping[str, Check]] = {"nucleus": SHARE, "draw": flag}

    nucleus: float = 0.2
    draw: bool = False

    @property
    def ignores(self) -> frozenset[str]:
        return UNUSED - {"block_length"}
