# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of an answer under a model, estimated from noised forward passes.

For evaluation and reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel, adapt
from ..window import AttentionWindow
from .agreement import agree
from .arguments import check_tokens, seeds_of
from .bounds import Bound
from .checks import flag, integer, number
from .config import LIMITS, DecodingConfig, SpecialTokens
from .presets import default_config
from .resolve import prepare
from .state import State
from .vector_bounds import DenoisingBound, FlowBound, NoiseBound

METHODS = ("monte-carlo", "mean-field", "coupled", "bound")
#: default number of integration steps of LangFlow's bound
ODE_STEPS = 128


@dataclass(frozen=True)
class LogLikelihood:
    """Result of `log_likelihood`, in nats, for B answers padded to a length of L tokens.

    Attributes
    ----------
    total : Tensor
        float64 `[B]`: estimate of ``ln p(answer | prompt)``, the sum of `per_token`.
    per_token : Tensor
        float64 `[B, L]`: contribution of each token of the answer; 0 for padding.
    standard_error : Tensor
        float64 `[B]`: standard error of `total`, computed from the spread of the samples. It ignores that the samples
        are stratified, so it tends to be too large. NaN for a single sample.
    num_forwards : int
        Number of noised copies of each answer that were scored. Each takes one forward pass, but may take several with
        method="bound" for models that attend block by block or whose noise is continuous.
    """

    total: Tensor
    per_token: Tensor
    standard_error: Tensor
    num_forwards: int


def log_likelihood(
    model,
    prompt: Tensor,
    answer: Tensor,
    prompt_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    *,
    method: str | None = None,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    prompt_mask_probability: float = 0.0,
    batch_size: int = 32,
    mask_token_id: int | None = None,
    logit_alignment: str | None = None,
    block_length: int | None = None,
    ode_steps: int | None = None,
    exact_divergence: bool = False,
    gradients: bool = False,
) -> LogLikelihood:
    """Estimate ``ln p(answer | prompt)`` under a diffusion language model.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        Same as for `generate`.
    prompt : Tensor
        int64 `[B, P]`, shorter prompts padded on the left; or `[P]` for one prompt.
    answer : Tensor
        int64 `[B, L]`, shorter answers padded on the right; or `[L]` for one answer. Every token is scored, including
        the end token if there is one. It must not hold the mask token.
    prompt_mask, answer_mask : Tensor, optional
        `[B, P]` and `[B, L]`, 0 for padding and 1 for tokens.
    method : {"monte-carlo", "mean-field", "coupled", "bound"}, optional
        If None, "bound" for MDLM, SEDD, Duo, LangFlow, Plaid, Diffusion-LM and all models that attend block by block,
        otherwise "monte-carlo". The first three methods need a mask-based model with full attention.

        - "monte-carlo": the bound of LLaDA (Nie et al., arXiv:2502.09992, equation 6). Each sample masks l of the
          answer's L tokens, drawn without replacement, and contributes ``(L / l) sum ln p(token)`` over them. The
          values of l are spread evenly over 1 … L from a random start. This estimate of the evidence lower bound is
          unbiased. The bound equals the log-likelihood if the model's conditionals are consistent with one joint
          distribution.
        - "mean-field": mask the whole answer and score every token from a single forward pass (d1, Zhao et al.,
          arXiv:2504.12216, which also masks prompt tokens: see `prompt_mask_probability`).
        - "coupled": each sample masks a random part of the answer in one forward pass and the rest in another, so that
          every token is scored exactly once, with the other part in view. One further sample masks everything. The
          result is the mean over `num_samples` pairs and that sample (DiffuCoder, Gong et al., arXiv:2506.20639).
        - "bound": the evidence lower bound for the noise process that the model was trained with (see `bounds`). Each
          sample draws a time and noises the answer up to that time. In models with blocks (BD3-LM, Arriola et al.,
          arXiv:2503.09573) each block has its own time and sees the clean blocks before it; with blocks of one token
          the bound is the log-likelihood itself. For LangFlow, the bound follows from the model's probability flow:
          each sample integrates it in `ode_steps` steps of Heun's method, with four forward and two backward passes
          per step.
    num_samples : int, optional
        Number of samples. By default 128 for "monte-carlo" and "bound", and 1 for "mean-field" and "coupled". The
        bound of LangFlow defaults to 1 sample, that of Diffusion-LM to the model's number of noise steps, so that each
        step is evaluated once.
    seed : int or Tensor, optional
        Same as for `generate`. The masks of a request depend only on its seed.
    prompt_mask_probability : float
        Probability with which each sample masks each token of the prompt, from 0 to 1.
    batch_size : int
        Number of sequences per forward pass. Does not change the masks.
    mask_token_id, logit_alignment, block_length
        Same as in `DecodingConfig`.
    ode_steps : int, optional
        Only for LangFlow's bound: number of integration steps. If None, 128.
    exact_divergence : bool
        Only for LangFlow's bound. If True, compute the divergence of the flow exactly, with one backward pass per
        element of the answer's embedding vectors in each evaluation. If False, estimate it from one random vector. With
        True, `standard_error` reflects only the noise put on the answer.
    gradients : bool
        Whether `total` and `per_token` can be differentiated with respect to the model's parameters. Attention is then
        computed by torch in float32, and in a model with blocks each block is forwarded together with everything
        before it.

    Returns
    -------
    LogLikelihood

    Raises
    ------
    ValueError, TypeError
        If an argument has the wrong type, shape, dtype, device or range, or has no effect; the message names it.
    """
    if method is not None and (not isinstance(method, str) or method not in METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    model = adapt(model)
    if method is None:
        method = "bound" if _has_bound(model) else "monte-carlo"
    is_flow = model.family.noise == "continuous"
    samples = _default_samples(model, method) if num_samples is None else num_samples
    samples, batch_size = integer(1)("num_samples", samples), integer(1)("batch_size", batch_size)
    ode_steps = integer(1, optional=True)("ode_steps", ode_steps)
    prompt_mask_probability = float(number(0, 1)("prompt_mask_probability", prompt_mask_probability))
    seed = LIMITS["seed"]("seed", seed)
    exact_divergence, gradients = flag("exact_divergence", exact_divergence), flag("gradients", gradients)
    _check_method(model, method, prompt_mask_probability, block_length)
    for name, value in (("exact_divergence", exact_divergence or None), ("ode_steps", ode_steps)):
        if value is not None and model.family.name != "langflow":
            raise ValueError(
                f"{name}={value} has no effect for models of family '{model.family.name}': only the bound of family "
                "'langflow' integrates a flow"
            )
    if is_flow and gradients:
        raise ValueError(f"gradients are not supported for the bound of family '{model.family.name}'")
    has_blocks = model.family.attention == "block"
    config = DecodingConfig(
        rule=default_config(model.family.preset).rule, mask_token_id=mask_token_id, logit_alignment=logit_alignment,
        block_length=block_length, cache="block" if has_blocks else "none",
    )  # fmt: skip
    model, config, special = prepare(model, config, {})
    prompt, origin = check_tokens("prompt", model, prompt, prompt_mask, special, mask_name="prompt_mask")
    answer, lengths = _check_answer(model, answer, answer_mask, len(prompt), special)
    tokens = torch.cat((prompt, answer), 1)
    if model.max_length is not None and tokens.shape[1] > model.max_length:
        raise ValueError(
            f"prompt ({prompt.shape[1]} tokens) and answer ({answer.shape[1]} tokens) are together longer than the "
            f"model's max_position_embeddings of {model.max_length}"
        )
    seeds = seeds_of(seed, len(tokens), tokens.device)
    agree(model, {"prompt": tokens, "prompt_mask": origin, "answer_mask": lengths}, config, seeds, method, samples)
    weighted: Iterator[Tensor]
    if is_flow:
        about = (model, config, special, tokens, origin, prompt.shape[1], lengths, seeds)
        if model.family.name == "langflow":
            weighted = FlowBound(*about, steps=ode_steps or ODE_STEPS, exact=exact_divergence).samples(samples)
        else:
            weighted = (NoiseBound if model.family.name == "plaid" else DenoisingBound)(*about).samples(samples)
    elif method == "bound":
        bound = Bound(model, config, special, tokens, origin, prompt.shape[1], lengths, seeds)
        weighted = bound.samples(samples, batch_size, gradients)
    else:
        task = _Task(model, config, special.mask, tokens, origin, prompt.shape[1], lengths)
        weighted = task.score(_Draws(task, seeds, prompt_mask_probability).masks(method, samples), batch_size)
    with torch.set_grad_enabled(gradients):
        per_token, error, count = _averaged(weighted, answer)
        total = per_token.sum(1)
    return LogLikelihood(total, per_token, error, count + samples if method == "coupled" else count)


def _default_samples(model: DiffusionModel, method: str) -> int:
    if method not in ("monte-carlo", "bound") or model.family.name == "langflow":
        return 1
    return model.config.noise_steps if model.family.name == "diffusion-lm" else 128


def _has_bound(model: DiffusionModel) -> bool:
    family = model.family
    return family.noise != "mask" or family.attention == "block" or family.name in ("mdlm", "sedd")


def _check_method(model: DiffusionModel, method: str, prompt_mask_probability: float, block_length: int | None) -> None:
    """Raise a ValueError if the method or an option of it does not apply to models of this family."""
    family = model.family
    if method == "bound":
        if family.name == "ssd-lm":
            raise ValueError(
                "model: there is no bound on the likelihood for models of family 'ssd-lm'. They are trained with the "
                "cross-entropy of the tokens at random noise levels, and the authors have published no bound"
            )
        if prompt_mask_probability > 0:
            raise ValueError(
                "prompt_mask_probability has no effect with method='bound', which adds noise only to the answer; got "
                f"{prompt_mask_probability}"
            )
    elif family.noise == "continuous":
        raise ValueError(
            f"method='{method}' needs a model with a mask token; models of family '{family.name}' have none"
        )
    elif family.attention != "full" or family.noise != "mask" or family.name == "sedd":
        needed = "full attention" if family.attention != "full" else "logits for the tokens behind the masks"
        raise ValueError(
            f"model must have {needed} for method='{method}'; models of family '{family.name}' have "
            + (f"attention '{family.attention}'" if family.attention != "full" else "none: use method='bound'")
        )
    if block_length is not None and family.attention != "block":
        raise ValueError(f"block_length has no effect for family '{family.name}', whose attention has no blocks")


def _averaged(weighted: Iterator[Tensor], answer: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the mean of the samples float64 `[B, L]`, the standard error of its sum `[B]`, and the sample count."""
    per_token = torch.zeros(answer.shape, dtype=torch.float64, device=answer.device)
    squares = torch.zeros(len(answer), dtype=torch.float64, device=answer.device)
    count = 0
    for one in weighted:
        per_token = per_token + one
        squares += one.detach().sum(1) ** 2
        count += 1
    per_token = per_token / count
    if count == 1:
        return per_token, torch.full_like(squares, torch.nan), count
    spread = (squares / count - per_token.detach().sum(1) ** 2).clamp(min=0)
    return per_token, (spread / (count - 1)).sqrt(), count


def _check_answer(
    model: DiffusionModel, answer: Tensor, mask: Tensor | None, batch: int, special: SpecialTokens
) -> tuple[Tensor, Tensor]:
    """Validate the answers; return them as `[B, L]` with their lengths, int32 `[B]`."""
    # mirrored, right padding becomes left padding
    mirrored, flipped = (x.flip(-1) if isinstance(x, Tensor) and x.dim() > 0 else x for x in (answer, mask))
    mirrored, padding = check_tokens(
        "answer", model, mirrored, flipped, special, mask_name="answer_mask", side="right"
    )  # fmt: skip
    if len(mirrored) != batch:
        raise ValueError(f"answer must have as many rows as prompt, {batch}; got {len(mirrored)}")
    if mirrored.shape[1] == 0:
        raise ValueError(f"answer must hold at least one token in each row; got shape {list(mirrored.shape)}")
    is_token = torch.arange(mirrored.shape[1], device=mirrored.device) >= padding[:, None]
    if special.mask >= 0 and bool((is_token & (mirrored == special.mask)).any()):
        raise ValueError(f"answer holds the mask token ({special.mask}), which is never predicted: its likelihood is 0")
    return mirrored.flip(-1), (mirrored.shape[1] - padding).int()


class _Task:
    """Prompts and answers, with the forward passes that score masked tokens of the answers."""

    def __init__(
        self, model: DiffusionModel, config: DecodingConfig, mask: int, tokens: Tensor, origin: Tensor, start: int,
        lengths: Tensor,
    ):  # fmt: skip
        self.model, self.mask, self.tokens, self.origin, self.start = model, mask, tokens, origin.int(), start
        self.lengths = lengths
        self.shift = 1 if config.logit_alignment == "shift" else 0
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.columns = columns.int()
        self.ends = start + lengths
        self.in_prompt = (columns >= origin[:, None]) & (columns < start)
        self.in_answer = (columns >= start) & (columns < start + lengths[:, None])

    def score(self, masks: Iterator[tuple[Tensor, Tensor, bool]], batch_size: int) -> Iterator[Tensor]:
        """Yield the weighted log-probabilities of each sample, float64 `[B, L]`.

        `masks` yields, for each forward pass, the masked positions, bool `[B, T]`; the weight of each request, float64
        `[B]`; and whether this forward pass completes the sample.
        """
        at_once = max(batch_size // len(self.tokens), 1)
        sample: Tensor | float = 0.0
        pending: list[tuple[Tensor, Tensor, bool]] = []

        def run() -> Iterator[Tensor]:
            nonlocal sample
            for (_, weight, complete), logp in zip(pending, self._forward([m for m, _, _ in pending])):
                sample = sample + weight[:, None] * logp
                if complete:
                    yield sample
                    sample = 0.0
            pending.clear()

        for item in masks:
            pending.append(item)
            if len(pending) == at_once:
                yield from run()
        yield from run()

    def _forward(self, masks: list[Tensor]) -> list[Tensor]:
        """Return the log-probabilities of the masked answer tokens, float64 `[B, L]` for each mask; 0 elsewhere."""
        if not masks:
            return []
        n, (batch, length) = len(masks), self.tokens.shape
        masked, true = torch.cat(masks), self.tokens.repeat(n, 1)
        origin = self.origin.repeat(n)
        scored = masked & self.in_answer.repeat(n, 1)
        canvas = State.of(true.masked_fill(masked, self.mask), scored, origin)
        answer = canvas.columns(torch.full_like(origin, self.start), length - self.start)
        window = canvas.window(answer, max(int(scored.sum(1).max()), 1))
        end = self.ends.repeat(n)
        positions = (self.columns - origin[:, None]).clamp(min=0).long()
        seen = AttentionWindow(
            self.columns.expand(n * batch, length).contiguous(), torch.stack((origin, end), 1),
            rotations=self.model.rotations(end - origin),
        )  # fmt: skip
        hidden = self.model.hidden(canvas.tokens, positions, seen)
        at = window.positions.long()
        row = (at - self.shift).clamp(min=0) + torch.arange(n * batch, device=at.device)[:, None] * length
        logits = self.model.logits(hidden.flatten(0, 1).index_select(0, row.flatten()))
        row_map = torch.where(at.flatten() >= 0, torch.arange(at.numel(), device=at.device), -1).int()
        banned = torch.tensor([self.mask], device=at.device)
        if torch.is_grad_enabled():
            lse = logits.index_fill(1, banned, -torch.inf).double().logsumexp(1)
        else:
            lse = ops.token_confidence(
                logits, row_map=row_map, banned=banned, with_margin=False, with_entropy=False
            ).logsumexp.double()
        given = true.gather(1, at.clamp(min=0)).flatten()
        z = logits.gather(1, given[:, None])[:, 0].double()
        logp = (z - lse).view(at.shape).masked_fill(at < 0, 0.0)
        out = torch.zeros((n * batch, length + 1), dtype=torch.float64, device=at.device)
        out = out.scatter(1, torch.where(at >= 0, at, length), logp)
        return list(out[:, self.start : length].split(batch))


class _Draws:
    """Draws the masks of each sample with the ops' counter-based random numbers; sample j uses those of step j."""

    def __init__(self, task: _Task, seeds: Tensor, prompt_mask_probability: float):
        self.task, self.seeds, self.in_prompt = task, seeds, prompt_mask_probability
        self.position = (task.columns - task.origin[:, None]).contiguous()

    def _select(self, eligible: Tensor, sample: int, rule: str = "none", **options) -> Tensor:
        score = torch.zeros(eligible.shape, device=eligible.device)
        step = torch.full((1,), sample, dtype=torch.int32, device=eligible.device)
        return ops.select_tokens(
            score, eligible, rule, seed=self.seeds, step=step, position=self.position, **options
        ).selected  # fmt: skip

    def some(self, eligible: Tensor, count: Tensor, sample: int) -> Tensor:
        """Draw `count` `[B]` of the eligible tokens, every subset equally likely; return bool `[B, T]`."""
        one = torch.ones(1, device=count.device)
        return self._select(eligible, sample, order_temperature=one, fill=count.int())

    def of_prompt(self, sample: int) -> Tensor:
        """Draw the prompt tokens that are masked as well in this sample, bool `[B, T]`."""
        if self.in_prompt == 0:
            return torch.zeros_like(self.task.in_prompt)
        chance = torch.full(self.task.in_prompt.shape, self.in_prompt, device=self.seeds.device)
        return self._select(self.task.in_prompt, sample, "bernoulli", cost=chance)

    def masks(self, method: str, samples: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yield the forward passes of `samples` samples, in the form that `_Task.score` takes."""
        task = self.task
        lengths, one = task.lengths.long(), torch.ones(len(task.lengths), dtype=torch.float64, device=self.seeds.device)
        if method == "mean-field":
            for j in range(samples):
                yield task.in_answer | self.of_prompt(j), one, True
            return
        # Each request uses mask sizes 1 … `sizes`: the first is drawn at random, the others follow at even spacing.
        sizes = lengths if method == "monte-carlo" else (lengths - 1).clamp(min=1)
        numbered = task.in_answer & (task.columns < task.start + sizes[:, None])
        first = self.some(numbered, torch.ones_like(sizes), 2**31 - 1).long().argmax(1) - task.start
        for j in range(samples):
            size = 1 + (first + j * sizes // samples) % sizes
            chosen = self.some(task.in_answer, size, j)
            if method == "monte-carlo":
                yield chosen | self.of_prompt(j), lengths / size.double(), True
            else:
                yield chosen | self.of_prompt(j), one, False
                yield (task.in_answer & ~chosen) | self.of_prompt(j), one, True
        if method == "coupled":
            yield task.in_answer | self.of_prompt(samples), one, True
