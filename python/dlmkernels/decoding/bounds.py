# SPDX-License-Identifier: Apache-2.0
"""Lower bounds on log-likelihoods from a model's training noise: MDLM, SEDD, Duo, and models with blocks.

Each sample draws a time, adds the noise that the forward process has added by then to the answer, and weights the
model's log-probabilities of the clean tokens. Each noise process is a class that defines how tokens are replaced and
the terms of the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from ..reference import bernoulli, philox, uniform_below, uniforms
from ..window import AttentionWindow
from .config import DecodingConfig, SpecialTokens
from .forward import Forward
from .schedule import Grid
from .state import State

#: Smallest time; times are drawn from here to 1, as in the published programs.
FIRST_TIME = 1e-3
#: Maximum number of logits that are evaluated together.
AT_ONCE = 2**24


def logits_without(z: Tensor, token: int) -> Tensor:
    """Return logits float64 `[N, V]` with `token` set to -inf; a negative `token` excludes none."""
    z = z.double()
    return z if token < 0 else z.index_fill(1, torch.tensor([token], device=z.device), -torch.inf)


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masking:
    """Noise that masks tokens: MDLM (Sahoo et al., arXiv:2406.07524) and BD3-LM (arXiv:2503.09573).

    Attributes
    ----------
    mask : int
        The mask token.
    noise_eps : float
        A token is masked by time t with probability (1 - noise_eps) t. The BD3-LM code uses 0.
    """

    mask: int
    noise_eps: float = 1e-3

    def replaced(self, time: Tensor) -> Tensor:
        """Return the probability that a token has been replaced by that time."""
        return (1 - self.noise_eps) * time

    def noise(self, bits: Tensor, vocab: int) -> Tensor:
        """Return the replacement of each token, given 32 random bits each."""
        return torch.full_like(bits, self.mask)

    def scores(self, noisy: Tensor) -> Tensor:
        """Return which tokens contribute terms to the bound, given the noisy tokens."""
        return noisy == self.mask

    def terms(self, z: Tensor, clean: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the terms ``ln p(clean) / t`` of ln p, `[N]`, from logits `z` `[N, V]`.

        `clean`, `noisy` and `time`, all `[N]`, are the original tokens, what they have become, and by what time.
        """
        z = logits_without(z, self.mask)
        return (z.gather(1, clean[:, None])[:, 0] - z.logsumexp(1)) / time


@dataclass(frozen=True)
class Absorbing(Masking):
    """Noise that masks tokens, for models of the concrete score: SEDD (Lou et al., arXiv:2310.16834)."""

    def terms(self, z: Tensor, clean: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return ``-sigma' (sum of s - r ln s(clean) + r (ln r - 1))``, r = 1 / (exp(sigma) - 1); no s of the mask."""
        z = logits_without(z, self.mask)
        left = 1 - (1 - self.noise_eps) * time  # exp(-sigma)
        rate, r = (1 - self.noise_eps) / left, left / (1 - left)
        z_clean = z.gather(1, clean[:, None])[:, 0]
        return -rate * (z.exp().sum(1) - r * z_clean + r * (r.log() - 1))


@dataclass(frozen=True)
class Uniform:
    """Noise that replaces tokens by others, drawn uniformly from all V: Duo (Sahoo et al., arXiv:2506.10892)."""

    noise_eps: float = 1e-3

    def replaced(self, time: Tensor) -> Tensor:
        return (1 - self.noise_eps) * time

    def noise(self, bits: Tensor, vocab: int) -> Tensor:
        return uniform_below(bits, vocab)

    def scores(self, noisy: Tensor) -> Tensor:
        return torch.ones_like(noisy, dtype=torch.bool)

    def terms(self, z: Tensor, clean: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the integrand of the bound, with the sign of its contribution to ln p.

        Let ``y = V alpha onehot(clean) + 1 - alpha``, let ``w`` be the same with the model's probabilities in place of
        the one-hot vector, and n the noisy token. The integrand is ``(-alpha') / (V alpha)`` times ``V / y[n] - V /
        w[n] - sum_j y[j] / y[n] ln((w[n] y[j]) / (w[j] y[n]))``.
        """
        vocab = z.shape[1]
        alpha = 1 - (1 - self.noise_eps) * time
        p = z.double().softmax(1)
        log_w = (vocab * alpha[:, None] * p + (1 - alpha)[:, None]).log()
        log_w_noisy, log_w_clean = (log_w.gather(1, i[:, None])[:, 0] for i in (noisy, clean))
        low, high = 1 - alpha, vocab * alpha + 1 - alpha
        y_noisy = torch.where(noisy == clean, high, low)
        # y is `high` once and `low` elsewhere, and sums to V
        own = high * high.log() + (vocab - 1) * low * low.log()
        cross = low * log_w.sum(1) + vocab * alpha * log_w_clean
        divergence = (vocab * (log_w_noisy - y_noisy.log()) + own - cross) / y_noisy
        bound = vocab / y_noisy - vocab * (-log_w_noisy).exp() - divergence
        return (1 - self.noise_eps) / (vocab * alpha) * bound


Process = Masking | Absorbing | Uniform


def process_of(model: DiffusionModel, special: SpecialTokens) -> Process | None:
    """Return the training noise of the model's family, or None if no bound is implemented for it."""
    name = model.family.name
    if model.family.attention == "block":
        return Masking(special.mask, 0.0)
    if name not in ("mdlm", "sedd", "duo"):
        return None
    eps = model.config.noise_eps
    if name == "duo":
        return Uniform(eps)
    return (Absorbing if name == "sedd" else Masking)(special.mask, eps)


# --- samples ---------------------------------------------------------------------------------------------------------


class Bound:
    """Sampler of the bound for a batch of prompts with answers.

    Parameters
    ----------
    model, config, special
        As for decoding.
    tokens : Tensor
        int64 `[B, T]`: prompts and answers.
    origin, start, lengths
        int32 `[B]`, int and int32 `[B]`: first column of each row, first column of the answers, and their lengths.
    seeds : Tensor
        int64 `[B]`: seed of each row's samples.
    """

    def __init__(
        self, model: DiffusionModel, config: DecodingConfig, special: SpecialTokens, tokens: Tensor, origin: Tensor,
        start: int, lengths: Tensor, seeds: Tensor,
    ):  # fmt: skip
        process = process_of(model, special)
        if process is None:
            others = model.family.attention == "full" and model.family.noise == "mask"
            raise ValueError(
                f"method='bound' is not defined for models of family '{model.family.name}'"
                + (": use 'monte-carlo', 'mean-field' or 'coupled'" if others else "")
            )
        if config.logit_alignment != "same" or config.seeded:
            raise ValueError(
                "method='bound' needs a model that predicts each token of a block at its own position; models of "
                f"family '{model.family.name}' do not"
            )
        self.model, self.config, self.special, self.process = model, config, special, process
        self.tokens, self.origin, self.start, self.seeds = tokens, origin.int(), start, seeds
        self.ends = (start + lengths).int()
        self.columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.in_answer = (self.columns >= start) & (self.columns < self.ends[:, None])
        self.has_blocks = config.attention == "block"
        grid = Grid.of(config, self.origin, start, tokens.shape[1], grows=False)
        #: block number of each column, int64 `[B, T]`; a single block if the model has none
        length = grid.length if self.has_blocks else tokens.shape[1]
        self.block_length, self.first = length, grid.first if self.has_blocks else torch.zeros_like(grid.first)
        self.block = ((self.columns - self.first[:, None]) // length).clamp(min=0)
        self.num_blocks = int(self.block.max()) + 1

    def samples(self, count: int, batch_size: int, gradients: bool) -> Iterator[Tensor]:
        """Yield `count` samples of each answer token's contribution to ln p, float64 `[B, L]`."""
        at_once = max(batch_size // len(self.tokens), 1)
        for first in range(0, count, at_once):
            some = range(first, min(first + at_once, count))
            drawn = [self._noisy(j, count) for j in some]
            noisy, time = (torch.cat(parts) for parts in zip(*drawn))
            yield from self.terms(noisy, time, gradients)[:, self.start :].split(len(self.tokens))

    def _noisy(self, sample: int, count: int) -> tuple[Tensor, Tensor]:
        """Return a sample's noisy texts, int64 `[B, T]`, and the time of each column, float64 `[B, T]`.

        Times are stratified over a request's samples, and differ between its blocks.
        """
        seeds, step = self.seeds[:, None], torch.full((1, 1), sample, device=self.tokens.device)
        cell = uniforms(seeds, self.block, step, "time", torch.zeros_like(self.block))
        time = FIRST_TIME + (1 - FIRST_TIME) * ((sample + self.block) % count + cell) / count
        if self.has_blocks and self.block_length == 1:
            time = torch.ones_like(time)  # only the mask remains: the term is the exact log-probability
        position = self.columns - self.origin[:, None]
        nothing = torch.zeros_like(position)
        changed = bernoulli(philox(seeds, position, step, "bernoulli", nothing), self.process.replaced(time))
        vocab = self.model.vocab_size or 0
        other = self.process.noise(philox(seeds, position, step, "renoise", nothing), vocab)
        return torch.where(changed & self.in_answer, other, self.tokens), time

    def terms(self, noisy: Tensor, time: Tensor, gradients: bool = False) -> Tensor:
        """Return the contributions to ln p, float64 `[R, T]`, for R = n B rows of noisy texts at times `[R, T]`."""
        n = len(noisy) // len(self.tokens)
        clean, in_answer = self.tokens.repeat(n, 1), self.in_answer.repeat(n, 1)
        scored = in_answer & self.process.scores(noisy)
        if not self.has_blocks:
            hidden = self._hidden(noisy, clean, n, time[:, 0])
            return self._scored(hidden, clean, noisy, time, scored)
        total = torch.zeros(clean.shape, dtype=torch.float64, device=clean.device)
        forward = self._by_block(clean, n, gradients)
        block = self.block.repeat(n, 1)
        # from the last block backward, so that each finds only clean blocks before it in the cache
        for number in reversed(range(self.num_blocks)):
            here = block == number
            if bool((scored & here).any()):
                hidden = forward(number, torch.where(here, noisy, clean))
                total = total + self._scored(hidden, clean, noisy, time, scored & here)
        return total

    def _forward(self, clean: Tensor, n: int, cache: str) -> Forward:
        grid = Grid.of(self.config, self.origin.repeat(n), self.start, clean.shape[1], grows=False)
        grid = replace(grid, ends=self.ends.repeat(n))
        state = State.of(clean, self.in_answer.repeat(n, 1), self.origin.repeat(n), grid.ends)
        forward = Forward(self.model, state, self.config.replace(cache=cache), self.special, grid, ends=grid.ends)
        forward.begin()
        return forward

    def _hidden(self, noisy: Tensor, clean: Tensor, n: int, time: Tensor) -> Tensor:
        """Return hidden states `[R, T, hidden]` of whole texts, for models without blocks."""
        forward = self._forward(clean, n, "none")
        window = AttentionWindow(forward.slots.contiguous(), forward.kv_range, rotations=forward.rotations)
        return forward.run(None, forward.positions, window, noisy, {"time": time.float()})

    def _by_block(self, clean: Tensor, n: int, gradients: bool):
        """Return a function from a block's number and tokens `[R, T]` to hidden states `[R, T, hidden]`.

        The result is valid in that block only. Without gradients, the clean texts are computed once into a cache, and
        then each block alone; with gradients, each block is computed together with everything before it.
        """
        forward = self._forward(clean, n, "none" if gradients else "block")
        visible = forward.block_causal()
        first, rows = self.first.repeat(n), len(clean)
        everywhere = self.columns.int().expand(rows, -1)
        if not gradients:
            forward.at(everywhere, forward.ends, tokens=clean, **visible)

        def hidden_of(number: int, tokens: Tensor) -> Tensor:
            end = torch.minimum(first + (number + 1) * self.block_length, forward.ends)
            if gradients:
                return forward.at(everywhere, end, tokens=tokens, **visible)
            offset = torch.arange(self.block_length, dtype=torch.int32, device=clean.device)
            columns = first[:, None] + number * self.block_length + offset
            inside = columns.clamp(0, clean.shape[1] - 1).long()
            hidden = forward.at(columns, end, tokens=tokens.gather(1, inside), **visible)
            out = hidden.new_zeros(rows, clean.shape[1] + self.block_length, hidden.shape[2])
            place = columns.clamp(min=0).long()[..., None].expand_as(hidden)
            return out.scatter(1, place, hidden)[:, : clean.shape[1]]

        return hidden_of

    def _scored(self, hidden: Tensor, clean: Tensor, noisy: Tensor, time: Tensor, scored: Tensor) -> Tensor:
        """Return the terms of the scored positions, float64 `[R, T]`, 0 elsewhere. Logits are computed in chunks."""
        rows = scored.flatten().nonzero()[:, 0]
        if len(rows) == 0:
            return torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
        flat = [x.flatten(0, 1) for x in (hidden, clean, noisy, time)]
        chunk = max(AT_ONCE // (self.model.vocab_size or 2**16), 1)
        parts = []
        for some in rows.split(chunk):
            h, *of_token = (x.index_select(0, some) for x in flat)
            parts.append(self.process.terms(self.model.logits(h), *of_token))
        out = torch.zeros(scored.numel(), dtype=torch.float64, device=scored.device)
        return out.index_put((rows,), torch.cat(parts)).view(scored.shape)
