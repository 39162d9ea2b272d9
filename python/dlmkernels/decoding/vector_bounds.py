# SPDX-License-Identifier: Apache-2.0
"""Bounds on the log-likelihoods of continuous diffusion models.

The answer is embedded as x, and the smallest amount of noise is added: ``z = alpha x + sigma n`` at gamma_0. Averaged
over that noise, ``ln p(answer) >= ln p(answer | z) + ln p(z) - ln q(z | answer)``. The model gives the first term; the
classes below compute the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from ..reference import normals, uniforms
from ..window import AttentionWindow
from .config import DecodingConfig, SpecialTokens
from .forward import Forward
from .rules.continuous import signal
from .schedule import Grid
from .state import State

#: Distance of the outermost quantiles of gamma from 0 and 1.
EPS = 1e-5


def nearest(table: Tensor, vectors: Tensor) -> Tensor:
    """Return the row of a table `[V, width]` nearest to each of the vectors `[N, width]`; the first one in a tie."""
    # the nearest row e maximizes e . x - |e|^2 / 2
    return table.index_select(0, (vectors.float() @ table.T - table.pow(2).sum(1) / 2).argmax(1))


class VectorBound:
    """Base class: predictions of a model for noisy answers. The arguments are those of `bounds.Bound`."""

    def __init__(
        self, model: DiffusionModel, config: DecodingConfig, special: SpecialTokens, tokens: Tensor, origin: Tensor,
        start: int, lengths: Tensor, seeds: Tensor,
    ):  # fmt: skip
        timed: Any = model
        self.model, self.config = timed, config
        self.tokens, self.start, self.seeds = tokens, start, seeds
        self.origin, ends = origin.int(), (start + lengths).int()
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.position = columns - self.origin[:, None]
        self.in_answer = ((columns >= start) & (columns < ends[:, None]))[..., None]
        grid = Grid.of(config, self.origin, start, tokens.shape[1], grows=False)
        state = State.of(tokens, self.in_answer[..., 0], self.origin, ends)
        self.forward = Forward(model, state, config, special, grid, ends=ends)
        self.forward.begin()
        self.kv_range = torch.stack((self.origin, ends), 1)
        self.table: Tensor = self.model.latent_table()
        self.embedded = self.table[tokens]
        #: whether the prompt stays free of noise, as the sampler or the training of the model has it
        self.clean_context = getattr(config.rule, "clean_context", False) or getattr(
            model.config, "clean_context", False
        )
        self.drawn = 0

    def _normals(self) -> Tensor:
        """Draw the next standard normal numbers, float32 `[B, T, width]`."""
        step = torch.full_like(self.position, self.drawn)
        self.drawn += 1
        return normals(self.seeds[:, None], self.position, step, self.table.shape[1])

    def _log_probability(self, y: Tensor, gamma: Tensor) -> Tensor:
        """Return ln p(token | z), float64 `[B, T]`, for z = sigma y at noise level gamma."""
        with torch.no_grad():
            z = y * signal(-gamma).float()
            return self._of_tokens(self._logits(z, gamma, self._opinion(z, gamma)))

    def _of_tokens(self, logits: Tensor) -> Tensor:
        """Return ln p of the answer's tokens, float64 `[B, T]`, from logits `[B, T, V]`."""
        return logits.double().log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def _opinion(self, z: Tensor, gamma: Tensor) -> Tensor | None:
        """Return the prediction of a forward pass without self-conditioning, as input for self-conditioning.

        None if the model does not use it.
        """
        if not getattr(self.model.config, "self_conditioning", True):
            return None
        with torch.no_grad():
            mean = self._logits(z, gamma, None).float().softmax(-1) @ self.table
        return torch.where(self.in_answer, mean, self.embedded) if self.clean_context else mean

    def _logits(self, z: Tensor, gamma: Tensor, opinion: Tensor | None) -> Tensor:
        return self.model.logits(self._said(z, gamma, opinion))

    def _said(self, z: Tensor, level: Tensor, opinion: Tensor | None = None) -> Tensor:
        """Return the model's hidden states for vectors z `[B, T, width]` at noise `level`: one number, or one per row.

        `opinion` is the input for self-conditioning.
        """
        forward = self.forward
        window = AttentionWindow(forward.slots.contiguous(), self.kv_range, rotations=forward.rotations)
        level = level.float().expand(len(z)).contiguous()
        if self.clean_context:
            z = torch.where(self.in_answer, z, self.embedded)
        return self.model.hidden(self.tokens, forward.positions, window, z, opinion, level=level)


class FlowBound(VectorBound):
    """Bound for LangFlow, from the divergence of its probability flow (arXiv:2604.11748).

    The flow transports z to pure noise, whose density is known. On the way, ln p changes by the divergence of the flow.
    With ``y = z / sigma`` and ``s = alpha / sigma``, the flow is ``dy / ds = x``, where x is the mean embedding that
    the model predicts. The divergence is estimated with one random vector u at each point (Hutchinson's estimator: the
    mean of ``u' J u`` is the trace of J). As in the published program, the self-conditioning input counts as constant.

    Parameters
    ----------
    steps : int
        Number of integration steps by Heun's method, each with two evaluations, between steps + 1 evenly spaced
        quantiles of gamma.
    exact : bool
        Whether to compute the divergence instead of estimating it. This takes a backward pass for each component of
        the vectors.
    """

    def __init__(self, *args: Any, steps: int = 128, exact: bool = False):
        super().__init__(*args)
        self.steps, self.exact = steps, exact
        q = torch.linspace(0.0, 1.0, steps + 1, device=self.tokens.device).clamp(EPS, 1 - EPS)
        gamma = self.model.gamma(q.double())
        #: alpha / sigma at each end of a step, and gamma_0
        self.ratio, self.least = torch.exp(-0.5 * gamma), gamma[0]

    def samples(self, count: int) -> Iterator[Tensor]:
        """Yield the contributions of the answers' tokens to ln p, float64 `[B, L]`, for each of `count` samples."""
        for sample in range(count):
            yield self.sample(sample * (2 * self.steps + 1))[:, self.start :]

    def sample(self, first: int) -> Tensor:
        """Compute one sample, float64 `[B, T]`, with random numbers from number `first` on."""
        self.drawn = first
        self.noise = self._normals()
        y = self.ratio[0].float() * self.embedded + self.noise
        total = self._log_probability(y, self.least) + self._flow(y)
        return total.masked_fill(~self.in_answer[..., 0], 0.0)

    def _flow(self, y: Tensor) -> Tensor:
        """Return ln p(z) - ln q(z | answer), float64 `[B, T]`: the change along the flow plus the noise at its end."""
        change = torch.zeros(y.shape[:2], dtype=torch.float64, device=y.device)
        for here, there in zip(self.ratio, self.ratio[1:]):
            width = (there - here).float()
            x, divergence = self._at(y, here)
            x_there, divergence_there = self._at(self._placed(y + width * x, there), there)
            y = self._placed(y + width / 2 * (x + x_there), there)
            change += width.double() / 2 * (divergence + divergence_there)
        return change - (0.5 * y.double() ** 2 - 0.5).sum(-1)

    def _placed(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Return y with the given positions moved to their known values at this point of the flow."""
        return torch.where(self.in_answer, y, ratio.float() * self.embedded + self.noise)

    def _at(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flow `[B, T, width]` at y, and its exact or estimated divergence by token, float64 `[B, T]`."""
        gamma = -2 * ratio.log()
        spread = signal(-gamma).float()
        z = y * spread
        opinion = self._opinion(z, gamma)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = self._logits(z, gamma, opinion).float().softmax(-1) @ self.table
            divergence = self._trace(x, z) if self.exact else self._probed(x, z)
        return x.detach(), divergence * spread.double()

    def _probed(self, x: Tensor, z: Tensor) -> Tensor:
        """Estimate the divergence of x with respect to z, with the next random vector."""
        u = self._normals() * self.in_answer
        (gradient,) = torch.autograd.grad((u * x).sum(), z)
        return (u * gradient).double().sum(-1)

    def _trace(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the divergence of x with respect to z, for all rows together, since rows are independent."""
        total = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        for column in range(self.start, x.shape[1]):
            for i in range(x.shape[2]):
                (gradient,) = torch.autograd.grad(x[:, column, i].sum(), z, retain_graph=True)
                total[:, column] += gradient[:, column, i].double()
        return total


class NoiseBound(VectorBound):
    """Bound for Plaid: that of variational diffusion models (Kingma et al., arXiv:2107.00630), at a random time.

    ``ln p(z) - ln q(z | answer)`` is at least minus the KL divergence of the noisiest vectors from pure noise, minus
    the mean of ``-SNR'(t) |x - x(t)|^2 / 2`` over times t. SNR is exp(-gamma), and x(t) is the model's prediction of x.
    """

    def samples(self, count: int) -> Iterator[Tensor]:
        """Yield the contributions of the answers' tokens to ln p, float64 `[B, L]`, for each of `count` samples."""
        for sample in range(count):
            self.drawn = 2 * sample
            yield self._sample(sample, count)[:, self.start :].masked_fill(~self.in_answer[:, self.start :, 0], 0.0)

    def _sample(self, sample: int, count: int) -> Tensor:
        """Compute one sample, float64 `[B, T]`. The times of a request's samples are spread evenly."""
        zero = torch.zeros_like(self.seeds)
        time = (sample + uniforms(self.seeds, zero, zero + sample, "time", zero)) / count
        with torch.enable_grad():
            time = time.requires_grad_()
            gamma = self.model.gamma(time)
            (slope,) = torch.autograd.grad(gamma.sum(), time)
        gamma = gamma.detach()[:, None, None]
        least, most = self.model.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64, device=time.device))
        total = self._log_probability((-0.5 * least).exp().float() * self.embedded + self._normals(), least)
        z = (signal(gamma) * self.embedded + signal(-gamma) * self._normals()).float()
        with torch.no_grad():
            x = self._logits(z, gamma[:, 0, 0], self._opinion(z, gamma[:, 0, 0])).float().softmax(-1) @ self.table
        lost = (self.embedded - x).double().pow(2).sum(-1)
        total = total - 0.5 * slope[:, None] * (-gamma[..., 0]).exp() * lost
        alpha2, sigma2 = signal(most) ** 2, signal(-most) ** 2
        return total - 0.5 * (sigma2 + alpha2 * self.embedded.double() ** 2 - 1 - sigma2.log()).sum(-1)


class DenoisingBound(VectorBound):
    """Bound for Diffusion-LM: that of a chain of noise steps, one of which each sample evaluates (arXiv:2205.14217).

    An answer's vectors are drawn around its embeddings, ``x = e + s n``, where s^2 is the noise variance of the first
    step. Then ``ln p(answer)`` is at least ``ln p(answer | x)``, minus the KL divergence of the noisiest vectors from
    pure noise, minus, for each step from x to that noise, the KL divergence between the true vectors before the step
    and the model's distribution of them. The published program (Li et al.) sums over all T steps. Here, a sample counts
    one of them T times, and T samples visit each step once. As in that program, the model's prediction is rounded to
    the nearest token vector, variances are those of the posterior, and in the step that ends at x, the noise of x
    counts as drawn independently of the noisy vectors that the model sees.
    """

    def samples(self, count: int) -> Iterator[Tensor]:
        """Yield the contributions of the answers' tokens to ln p, float64 `[B, L]`, for each of `count` samples."""
        model: Any = self.model.model
        self.kept: Tensor = model.kept(self.tokens.device)
        for sample in range(count):
            self.drawn = 2 * sample
            yield self._sample(sample, count)[:, self.start :].masked_fill(~self.in_answer[:, self.start :, 0], 0.0)

    def _sample(self, sample: int, count: int) -> Tensor:
        """Compute one sample, float64 `[B, T]`. The steps of a request's samples are spread evenly."""
        zero, steps = torch.zeros_like(self.seeds), len(self.kept)
        time = (sample + uniforms(self.seeds, zero, zero + sample, "time", zero)) / count
        index = (time * steps).long().clamp(max=steps - 1)
        embedded, first = self.embedded.double(), 1 - self.kept[0]
        x = embedded + first.sqrt() * self._normals()
        kept = self.kept[index][:, None, None]
        z = kept.sqrt() * x + (1 - kept).sqrt() * self._normals()
        with torch.no_grad():
            told: Any = self.model
            said = self._said(z.float(), told.told(index / max(steps - 1, 1)))
            if getattr(self.config.rule, "clamps", False):
                said = nearest(self.table, said.flatten(0, 1)).view(said.shape)
            total = self._of_tokens(self.model.logits(x.float()))
        total = total - steps * self._divergence(index, x, said.double())
        last = self.kept[-1]
        return total - 0.5 * (1 - last + last * x**2 - 1 - (1 - last).log()).sum(-1)

    def _divergence(self, index: Tensor, x: Tensor, said: Tensor) -> Tensor:
        """Return the KL divergence of the true vectors before step `index` `[B]` from the model's, float64 `[B, T]`."""
        before = torch.cat((torch.ones_like(self.kept[:1]), self.kept[:-1]))
        now, share = self.kept, 1 - self.kept / before
        variance = share * (1 - before) / (1 - now)
        # the posterior variance of the first step is 0, and that of the second step replaces it
        variance = torch.cat((variance[1:2], variance[1:]))
        weight = share * before.sqrt() / (1 - now)
        weight, of_step = weight[index][:, None, None], variance[index][:, None, None]
        apart = weight**2 * (x - said) ** 2 / (2 * of_step)
        # the first step leads to vectors around the embeddings, whose noise variance is known
        ratio = (1 - now[0]) / variance[0]
        of_first = 0.5 * (ratio - 1 - ratio.log() + (self.embedded.double() - said) ** 2 / variance[0])
        return torch.where(index[:, None, None] == 0, of_first, apart).sum(-1)
