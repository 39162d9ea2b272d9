# SPDX-License-Identifier: Apache-2.0
"""Published decoders restated in plain Python, one request at a time: what `dlmkernels.generate` is compared with.

Each function follows its paper and the authors' program as formulas, in float32, at temperature 0, and differs from
that program only where dlmkernels does so on purpose. All share these differences:

- equal scores go to the lowest position and equal logits to the lowest id (the programs: wherever `torch.topk` and
  `torch.argmax` put them);
- the mask token is never proposed: its logit is -inf before anything else, so that the other probabilities are
  renormalised without it (the programs can commit it, and the position then stays masked);
- the softmax is taken in float32 (Fast-dLLM: float64; LLaDA, Dream: the model's dtype);
- what a step may commit are the masks of the current block, and its quota counts exactly these;
- nothing is forwarded for a block that has no mask left.

Every function takes `quirk=True`, which restores what the program does beside the paper, so that tests can show each
difference on a case made for it. (Ties stay as above: where the programs put them is not defined.)

A model is a callable `model(tokens[1, T])` that returns logits `[1, T, V]`, or a `PlainLlama`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


class Endless(Exception):
    """A program's loop would not come to an end."""


class Request:
    """A canvas `[T]` with masks, and what is recorded while they are decoded.

    Attributes
    ----------
    tokens : Tensor
        int64 `[T]`.
    commit_step, confidence : Tensor
        int32 and float32 `[T]`: the forward (from 0) that decided a position (-1: it was given), and the probability
        that its token had then.
    num_forwards : int
    slack : float
        How little was missing, in the quantity compared, for any decision to come out otherwise: where this is no
        larger than the rounding of two different float32 programs, they may rightly differ.
    """

    def __init__(self, canvas: Tensor, mask: int):
        self.tokens, self.mask = canvas.clone(), mask
        self.commit_step = torch.full_like(canvas, -1, dtype=torch.int32)
        self.confidence = torch.zeros(canvas.shape)
        self.num_forwards, self.slack = 0, math.inf

    def open(self, start: int, end: int) -> list[int]:
        """Masked positions of `[start, end)`."""
        return [i for i in range(start, end) if self.tokens[i] == self.mask]

    def commit(self, proposals: Proposals, chosen: list[int]) -> None:
        """Write the chosen ones (indices into the proposals) and count the forward they came from."""
        for i in chosen:
            position = proposals.positions[i]
            self.tokens[position] = proposals.token[i]
            self.commit_step[position] = self.num_forwards
            self.confidence[position] = proposals.probability[i]
            self.note(proposals.lead[i])
        self.num_forwards += 1

    def note(self, *distances: float) -> None:
        self.slack = min((self.slack, *distances))


@dataclass
class Proposals:
    """What one forward says of some positions: lists of one element a position.

    `lead` is how much larger the proposed token's logit is than any other's: infinite where filters left no other, and
    probability and margin are then exactly 1 and the entropy 0 in any arithmetic.
    """

    positions: list[int]
    token: list[int]
    probability: list[float]
    margin: list[float]
    entropy: list[float]
    lead: list[float]


def propose(logits: Tensor, positions: list[int], mask: int, quirk: bool = False) -> Proposals:
    """Greedy proposals at some positions from `logits` `[T, V]`, which hold a row for every canvas position."""
    z = logits[positions]
    if not quirk:
        z = z.float().index_fill(1, torch.tensor([mask]), -torch.inf)
    return _describe(z, positions)


def _describe(z: Tensor, positions: list[int]) -> Proposals:
    p = torch.softmax(z, -1)  # in the dtype of z
    ids = torch.arange(z.shape[1])
    token = torch.where(z == z.amax(-1, keepdim=True), ids, z.shape[1]).amin(-1)
    top = p.sort(-1, descending=True).values
    best = z.sort(-1, descending=True).values
    return Proposals(
        positions,
        token.tolist(),
        p.gather(1, token[:, None])[:, 0].tolist(),
        (top[:, 0] - top[:, 1]).tolist(),
        # Dream's program guards the logarithm in this way; it changes an entropy by less than 1e-10 V
        (-p * torch.log(p + 1e-10)).sum(-1).tolist(),
        (best[:, 0] - best[:, 1]).tolist(),
    )


def ranking(score: list[float]) -> list[int]:
    """Indices by score, largest first; equal scores by index."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def take(request: Request, proposals: Proposals, score: list[float], count: int) -> None:
    """Commit the `count` best."""
    order = ranking(score)
    if 0 < count < len(order):
        last, next_one = order[count - 1], order[count]
        if not proposals.lead[last] == proposals.lead[next_one] == math.inf:
            request.note(score[last] - score[next_one])
    request.commit(proposals, order[:count])


def blocks_of(start: int, end: int, length: int | None) -> list[tuple[int, int]]:
    length = length or end - start
    return [(s, min(s + length, end)) for s in range(start, end, length)]


def forward(model: Callable, tokens: Tensor, *reuse) -> tuple[Tensor, list | None]:
    """Logits `[T, V]` of one canvas, and keys and values if the model returns them."""
    out = model(tokens[None], *reuse)
    logits, kept = out if isinstance(out, tuple) else (out, None)
    return logits[0], kept


def shifted(logits: Tensor) -> Tensor:
    """For models that speak of the next position: row i - 1 at i; the first position keeps its own."""
    return torch.cat((logits[:1], logits[:-1]))


# --- LLaDA -----------------------------------------------------------------------------------------------------------


def linear_quota(masks: int, steps: int) -> list[int]:
    """Equal shares, the first `masks % steps` of them larger by one."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def llada(
    model: Callable, canvas: Tensor, start: int, mask: int, *, block_length: int | None = None,
    steps: int | None = None, cfg_scale: float = 0.0, quirk: bool = False,
) -> Request:  # fmt: skip
    """LLaDA's low-confidence remasking (Nie et al., arXiv:2502.09992, section 2.4 and appendix B.4).

    Block by block, each of its share of the steps commits its share of the block's masks, most probable first. With
    guidance the logits are u + (s + 1)(c - u), u from the canvas whose given tokens are masked.

    `quirk`: masks left of the block compete for its quota without being counted in it; the mask token may win; the
    softmax has the dtype of the logits; and all steps are run, even when nothing is left to commit.
    """
    request = Request(canvas, mask)
    given = canvas != mask
    blocks = blocks_of(start, len(canvas), block_length)
    for begin, end in blocks:
        masks = len(request.open(begin, end))
        for count in linear_quota(masks, (steps or end - begin) // (len(blocks) if steps else 1)):
            eligible = request.open(0 if quirk else begin, end)
            if not eligible and not quirk:
                break
            logits, _ = forward(model, request.tokens)
            if cfg_scale > 0:
                blind, _ = forward(model, request.tokens.masked_fill(given, mask))
                logits = blind + (cfg_scale + 1) * (logits - blind)
            proposals = propose(logits, eligible, mask, quirk)
            take(request, proposals, proposals.probability, count)
    return request


# --- Fast-dLLM -------------------------------------------------------------------------------------------------------


def threshold_count(request: Request, confidence: list[float], threshold: float) -> int:
    """All that reach the threshold; at least one."""
    confidence = sorted(confidence, reverse=True)
    request.note(*(abs(c - threshold) for c in confidence[1:]))
    return max(sum(c >= threshold for c in confidence), 1)


def factor_count(request: Request, confidence: list[float], factor: float, quirk: bool) -> int:
    """The longest run of ranks n, from the best, with c_n >= 1 - factor / (n + 1); at least one.

    `quirk`: when only the very last one fails it is taken all the same.
    """
    confidence = sorted(confidence, reverse=True)
    count = 1
    while count < len(confidence):
        excess = confidence[count] - (1 - factor / (count + 2))
        request.note(abs(excess))
        if excess < 0:
            break
        count += 1
    return len(confidence) if quirk and count == len(confidence) - 1 else count


def fast_dllm(
    model: Callable, canvas: Tensor, start: int, mask: int, *, threshold: float | None = None,
    factor: float | None = None, block_length: int | None = None, cache: str = "none", shift: bool = False,
    quirk: bool = False, vicinity: tuple[int, int] = (0, 0), warmup: int = 1, refresh: int | None = None,
) -> Request:  # fmt: skip
    """Fast-dLLM's confidence-aware parallel decoding (Wu et al., arXiv:2505.22618, section 3).

    Each forward commits what reaches the threshold, or what the factor rule allows, until the block has no mask. The
    first forward of a block takes the whole canvas. Later ones take, with cache "prefix", the positions from the
    block's start on and what was kept left of them; with "dual" the block alone and what was kept on both sides.

    `shift`: logits speak of the next position. Forwards then start one position before the block, which is computed
    and kept anew with it, so that the block's first position is read from the row before it.

    Vicinity refresh of dInfer (Ma et al., arXiv:2510.08666): later forwards also take `vicinity` positions left and
    right of the block; the first `warmup` ones of a block, and every `refresh`-th, take the whole canvas.

    `quirk`: the factor rule's last rank, see `factor_count`; the mask token may win; the softmax is in float64; and
    with `shift` (the program's adaptation to Dream) the first forward of a block commits its first position, whatever
    its confidence, and nothing else, and later ones start at the block.
    """
    request = Request(canvas, mask)
    for begin, end in blocks_of(start, len(canvas), block_length):
        kept, index = None, 0
        while eligible := request.open(begin, end):
            if request.num_forwards > 4 * len(canvas):
                raise Endless
            if cache == "none" or index < warmup or (refresh and index % refresh == 0):
                first, (logits, kept) = 0, forward(model, request.tokens)
            else:
                first = max(begin - max(shift and not quirk, vicinity[0]), 0)
                last = min(end + vicinity[1], len(canvas)) if cache == "dual" else len(canvas)
                logits, again = forward(model, request.tokens[first:last], kept, first, cache == "dual")
                if cache == "dual" or vicinity[0]:
                    kept = again
            logits = shifted(logits) if shift else logits
            if shift and quirk and index == 0:
                eligible = [begin]
            rows = [i - first for i in eligible]
            proposals = propose(logits.double() if quirk else logits, rows, mask, quirk)
            proposals.positions = eligible
            c = proposals.probability
            if threshold is not None:
                count = threshold_count(request, c, threshold)
            else:
                count = factor_count(request, c, factor, quirk)
            take(request, proposals, c, count)
            index += 1
    return request


# --- dKV-Cache -------------------------------------------------------------------------------------------------------


def delayed(
    model: Callable, canvas: Tensor, start: int, mask: int, *, block_length: int, warmup: int = 2,
    refresh: int | None = None, threshold: float | None = None, shift: bool = False,
) -> Request:  # fmt: skip
    """dKV-Cache-Decode (Ma et al., arXiv:2505.15781, section 3): keys and values are kept one step after the token.

    One token a step, or with a threshold as in Fast-dLLM. A block's first two steps take the whole canvas, so does
    every `refresh`-th. The others take the positions that are masked anywhere in the canvas, and those that the step
    before decided; what is kept of all the others is seen. With `shift`, as its program for Dream ("un"): the rows
    left of those positions, since they speak of them.
    """
    request = Request(canvas, mask)
    for begin, end in blocks_of(start, len(canvas), block_length):
        kept, index, before = None, 0, []
        while eligible := request.open(begin, end):
            masked = request.open(0, len(canvas))
            if index < warmup or (refresh and index % refresh == 0):
                rows = list(range(len(canvas)))
                logits, kept = forward(model, request.tokens)
            else:
                rows = sorted({max(i - shift, 0) for i in before})
                out, kept = model(request.tokens[None, rows], kept, columns=torch.tensor(rows))
                logits = out[0]
            proposals = propose(logits, [rows.index(max(i - shift, 0)) for i in eligible], mask)
            proposals.positions = eligible
            c = proposals.probability
            take(request, proposals, c, 1 if threshold is None else threshold_count(request, c, threshold))
            before, index = masked, index + 1
    return request


# --- Dream -----------------------------------------------------------------------------------------------------------


def time_quota(masks: float, step: int, steps: int, eps: float = 1e-3) -> int:
    """`int(n (1 - t[i+1] / t[i]))` with t falling linearly from 1 to eps, in float32; the last step takes the rest."""
    t = torch.linspace(1, eps, steps + 1)
    if step == steps - 1:
        return int(masks)
    return int(torch.tensor(masks, dtype=torch.float32) * (1 - t[step + 1] / t[step]))


def nucleus(request: Request, z: Tensor, top_p: float) -> Tensor:
    """Keep a logit if those above it hold at most `top_p` of the probability; equal logits together."""
    p = torch.softmax(z, -1)
    larger = z[:, None, :] > z[:, :, None]  # [row, v, other]: the other's logit is larger than v's
    above = (p[:, None, :] * larger).sum(-1)
    request.note((above[z > -torch.inf] - top_p).abs().min().item())
    return z.masked_fill(above > top_p, -torch.inf)


def best_k(z: Tensor, k: int) -> Tensor:
    """Keep a logit if it is at least the k-th largest."""
    return z.masked_fill(z < z.sort(-1, descending=True).values[:, k - 1 : k], -torch.inf)


def dream(
    model: Callable, canvases: Tensor, mask: int, *, steps: int, alg: str = "entropy", top_p: float | None = None,
    top_k: int | None = None, eps: float = 1e-3, quirk: bool = False,
) -> list[Request]:  # fmt: skip
    """Dream's decoder (Ye et al., arXiv:2508.15487, and its program `diffusion_generate`) for a batch `[B, T]`.

    Logits of position i stand in row i - 1. At step i of S, `time_quota` of the masks are committed, in the order of
    the probability (`maskgit_plus`), of the gap between the two best (`topk_margin`) or of the negative entropy
    (`entropy`) of the distribution after top-p, then top-k.

    `quirk`: the quota is that of the batch's mean number of masks; a row with fewer masks then also picks decided
    positions, and has them masked again; the mask token may win.
    """
    requests = [Request(canvas, mask) for canvas in canvases]
    length = canvases.shape[1]
    for step in range(steps):
        mean = sum(len(r.open(0, length)) for r in requests) / len(requests)
        for request in requests:
            eligible = request.open(0, length)
            if not eligible and not quirk:
                continue
            logits = shifted(forward(model, request.tokens)[0])
            z = logits[eligible]
            if not quirk:
                z = z.float().index_fill(1, torch.tensor([mask]), -torch.inf)
            if top_p is not None and top_p < 1:
                z = nucleus(request, z, top_p)
            if top_k is not None:
                z = best_k(z, top_k)
            proposals = _describe(z, eligible)
            score = {
                "maskgit_plus": proposals.probability,
                "topk_margin": proposals.margin,
                "entropy": [-h for h in proposals.entropy],
            }[alg]
            count = time_quota(mean if quirk else len(eligible), step, steps, eps)
            decided = [i for i in range(length) if i not in eligible]
            take(request, proposals, score, count)
            for i in decided[: max(count - len(eligible), 0)]:
                request.tokens[i] = mask
    return requests


def rnd1(model: Callable, canvas: Tensor, start: int, mask: int, *, steps: int) -> Request:
    """RND1's decoder (its program `diffusion_sample`): after i of S steps, floor(n (S - i) / S) of the n masks are left.

    They are those with the largest entropies. Logits of position i stand in row i - 1. The program computes the share
    in float32.
    """
    request = Request(canvas, mask)
    total = len(request.open(start, len(canvas)))
    for step in range(steps):
        eligible = request.open(start, len(canvas))
        proposals = propose(shifted(forward(model, request.tokens)[0]), eligible, mask)
        count = len(eligible) - total * (steps - step - 1) // steps
        take(request, proposals, [-h for h in proposals.entropy], count)
    return request


# --- EB-Sampler ------------------------------------------------------------------------------------------------------


def entropy_bounded(
    model: Callable, canvas: Tensor, start: int, mask: int, *, bound: float, block_length: int | None = None,
    quirk: bool = False,
) -> Request:  # fmt: skip
    """EB-Sampler (Ben-Hamu et al., arXiv:2505.24857, algorithm 1) in blocks, with entropy as its error proxy.

    In order of entropy, the longest prefix whose entropies, without the largest, sum to at most `bound`; at least one.

    `quirk`: the mask token may win.
    """
    request = Request(canvas, mask)
    for begin, end in blocks_of(start, len(canvas), block_length):
        while eligible := request.open(begin, end):
            if request.num_forwards > 4 * len(canvas):
                raise Endless
            proposals = propose(forward(model, request.tokens)[0], eligible, mask, quirk)
            entropy = sorted(proposals.entropy)
            count = 1
            while count < len(entropy):
                before = sum(entropy[:count])  # ascending, so the largest of the prefix is its last
                request.note(abs(before - bound))
                if before > bound:
                    break
                count += 1
            take(request, proposals, [-h for h in proposals.entropy], count)
    return request


# --- blocks after a finished context ---------------------------------------------------------------------------------


def block_causal(length: int, block: int, first: int) -> Tensor:
    """Who sees whom, bool `[T, T]`: blocks of `block` counted from `first`, what stands left of it one block more."""
    column = torch.arange(length)
    number = torch.where(column < first, -1, (column - first).div(block, rounding_mode="floor"))
    return number[None] <= number[:, None]


def block_diffusion(
    model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, block: int, threshold: float, strict: bool = True,
    grid: str = "absolute", attention: str = "block", shift: bool = False, seeded: bool = False,
    part: int | None = None, fused: bool = True, reuse: bool = False,
) -> Request:  # fmt: skip
    """Blocks decoded one after another, each seeing those before it and all of itself; nothing is kept in a cache.

    - SDAR (arXiv:2510.06303, `generate.py`, low_confidence_dynamic) and LLaDA2.0 (arXiv:2512.15745): `grid` absolute:
      the prompt's last, incomplete block is completed first, and the last block is decoded whole;
    - Fast-dLLM v2 (arXiv:2509.26328): so too, with `shift` and `seeded`: a block's first token is what the row before
      it predicts, and the rest is decoded in parts of `part`;
    - D2F (arXiv:2508.09192), its blocks one after another: `grid` prompt: the prompt is one block;
    - dllm's BD3-LM sampler: `grid` both-ways, prompts being padded to whole blocks;
    - Nemotron-Labs-Diffusion (arXiv:2607.05722): `attention` causal-context: what is decided sees what stands left of
      it alone, `seeded`.

    A forward commits everything surer than the threshold (`strict`: than, else: as), at least one. What is decided is
    forwarded once more before it can be seen: by itself, or (`fused`) with the first step of the next block.

    `reuse`, Fast-dLLM v2's block cache: the first forward of a part takes all of the block, the others the part alone
    (and the row before it, with `shift`, but not the one before the block), beside what the first one has left of the
    rest.

    `model(tokens, visible)` returns the logits of all rows.
    """
    first = len(prompt) // block * block if grid == "absolute" else len(prompt)
    length = len(prompt) + new_tokens
    if grid == "absolute":
        length = -(-length // block) * block
    request = Request(torch.cat((prompt, prompt.new_full((length - len(prompt),), mask))), mask)
    origin = {"absolute": 0, "prompt": first, "both-ways": first % block}[grid]

    def logits(begin: int, end: int, kept: dict | None = None) -> Tensor:
        """Of the columns up to `end`, those from `begin` on being the open block."""
        visible = block_causal(end, block, origin)
        if attention != "block":
            visible = torch.ones(end, end).tril().bool()
        if attention == "causal-context":
            visible[begin:] = True
        return model(request.tokens[None, :end], visible, **({} if kept is None else {"kept": kept}))[0]

    for begin in range(first, length, block):
        end = min(begin + block, length)
        if begin > 0 and (seeded or not fused):
            row = logits(begin, begin)[-1:]
            seed = propose(row, [0], mask)
            seed.positions = [begin]
            request.commit(seed, [0] if seeded and request.open(begin, begin + 1) else [])
        for start in range(begin, end, part or block):
            stop = min(start + (part or block), end)
            kept, z = {}, None
            while eligible := request.open(start, stop):
                if reuse and z is not None:
                    at = torch.arange(max(start - shift, begin), stop)
                    seen = block_causal(end, block, origin)[at]
                    z = z.index_copy(0, at, model(request.tokens[None, at], seen, at, kept=kept)[0])
                else:
                    z = logits(begin, end, kept) if reuse else logits(begin, end)
                proposals = propose(shifted(z) if shift else z, eligible, mask)
                c = proposals.probability
                request.note(*(abs(p - threshold) for p in sorted(c)[:-1]))
                take(request, proposals, c, max(sum(p > threshold if strict else p >= threshold for p in c), 1))
    kept = len(prompt) + new_tokens
    request.tokens, request.commit_step = request.tokens[:kept], request.commit_step[:kept]
    request.confidence = request.confidence[:kept]
    return request


# --- several blocks at once ------------------------------------------------------------------------------------------


@dataclass
class Span:
    """A block in a pipeline: columns `[start, end)`; the forward before which it was found finished."""

    start: int
    end: int
    finished: int | None = None

    def progress(self, request: Request) -> float:
        return (self.end - self.start - len(request.open(self.start, self.end))) / (self.end - self.start)


def first_of(request: Request, begin: int, eos: int | None) -> int | None:
    """The first column from `begin` on at which the end token stands."""
    return next((i for i in range(begin, len(request.tokens)) if request.tokens[i] == eos), None)


def ended(request: Request, begin: int, eos: int | None, pad: int) -> bool:
    """Pad what stands behind an end token once nothing before it is open (the programs: when the answer is shown)."""
    at = first_of(request, begin, eos)
    if at is None or request.open(begin, at):
        return False
    request.tokens[at + 1 :] = pad
    return True


def discrete_forcing(
    model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, block: int, threshold: float, add: float,
    decoded: float, shift: bool = False, eos: int | None = None, pad: int = 0, buffer: int | None = None,
) -> Request:  # fmt: skip
    """D2F (arXiv:2508.09192, `eval_llada.py` and `eval_dream.py` of its program), without a cache.

    The prompt is the first block and finished. A loop adds a block when the last one is decided to the share `add` and
    no end token has appeared; a block is complete when the one before it is decided to the share `decoded`. Of every
    block the program commits what is surer than `threshold`, and of a complete one at least the best.
    `model(tokens, visible)` returns the logits of all rows. `buffer`: no block is added while so many, from the first
    that is not finished on, are there.
    """
    start, length = len(prompt), len(prompt) + new_tokens
    request = Request(torch.cat((prompt, prompt.new_full((new_tokens,), mask))), mask)
    blocks = [Span(0, start)]
    while True:
        at, seen = blocks[-1].end, first_of(request, start, eos) is not None
        unfinished = [n for n, one in enumerate(blocks) if request.open(one.start, one.end)]
        has_room = buffer is None or not unfinished or len(blocks) - unfinished[0] < buffer
        if at < length and not seen and has_room and blocks[-1].progress(request) >= add:
            blocks.append(Span(at, min(at + block, length)))
        if not request.open(0, blocks[-1].end):
            return request
        z = model(request.tokens[None, : blocks[-1].end], block_causal(blocks[-1].end, block, start))[0]
        proposals = propose(shifted(z) if shift else z, request.open(0, blocks[-1].end), mask)
        chosen = []
        for before, this in pairwise(blocks):
            inside = [n for n, i in enumerate(proposals.positions) if this.start <= i < this.end]
            c = {n: proposals.probability[n] for n in inside}
            request.note(*(abs(p - threshold) for p in c.values()))
            sure = [n for n in inside if c[n] > threshold]
            if inside and not sure and before.progress(request) >= decoded:
                order = sorted(inside, key=lambda n: -c[n])  # stable: equals by position
                sure = order[:1]
                request.note(*(c[order[0]] - c[n] for n in order[1:2]))
            chosen += sure
        request.commit(proposals, chosen)
        if ended(request, start, eos, pad):
            return request


def multi_block(
    model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, block: int, threshold: float, add: float,
    decoded: float, shift: bool = False, eos: int | None = None, pad: int = 0, delay: int | None = None,
    interval: int | None = None, best_of_all: bool = True,
) -> Request:  # fmt: skip
    """d3LLM (arXiv:2601.07568, `generate_multi_block`), whose forwards take all of a canvas of masks.

    Blocks are added and completed as in D2F. Of all masks of the blocks so far the one of least entropy is committed
    (not with `best_of_all` off, as in the program for Dream, `_sample_multi_block`), and what has no more than
    `threshold`; if that is nothing in the first complete block with masks, its best too. An end token overwrites what stands behind it. (In the forward after that the program takes the masks for those that
    were there before: what it commits behind the end token is overwritten again, but one of it can have been the best.)

    With a `delay` (`generate_multi_block_kv_cache`, `cache_delay_iter`) a finished block goes into the cache, after the
    blocks on its left, `delay` forwards after it was found finished. The forward that takes it there begins behind the
    cache. So do the others, but those while a finished block waits and every `interval`-th: they take everything and
    renew what is cached.

    `model(tokens)` returns the logits of all rows; with a delay it is a `PlainDecoder`.
    """
    start, length = len(prompt), len(prompt) + new_tokens
    request = Request(torch.cat((prompt, prompt.new_full((new_tokens,), mask))), mask)
    blocks = [Span(0, start, finished=0), Span(start, min(start + block, length))]
    cached, past = 0, {}

    def with_cache(n: int) -> Tensor:
        """Logits of the n-th forward, 0 where it does not reach."""
        nonlocal cached, past
        reached = cached
        for this in blocks:
            if this.end > reached:
                if request.open(this.start, this.end):
                    break
                this.finished = n if this.finished is None else this.finished
                if n - this.finished < delay:
                    break
                reached = this.end
        appends = reached > cached
        waits = any(this.finished is not None and this.end > reached for this in blocks)
        renews = not appends and (waits or (interval is not None and n % interval == 0))
        begin, kept = (0, {}) if renews else (cached, dict(past))
        z = model(request.tokens[None, begin:], positions=torch.arange(begin, length), kept=kept)[0]
        if cached or appends:
            past = kept if appends or renews else past
        cached = reached
        return torch.cat((z.new_zeros(begin, z.shape[1]), z))

    while True:
        stop = first_of(request, start, eos)
        if stop is not None:
            request.tokens[stop + 1 :] = eos
        at = blocks[-1].end
        if stop is None and at < length and blocks[-1].progress(request) >= add:
            blocks.append(Span(at, min(at + block, length)))
        complete = [this for before, this in pairwise(blocks) if before.progress(request) >= decoded]
        if not (masks := request.open(0, blocks[-1].end)):
            return request
        z = model(request.tokens[None])[0] if delay is None else with_cache(request.num_forwards + 1)
        proposals = propose(shifted(z) if shift else z, masks, mask)
        h = proposals.entropy
        order = sorted(range(len(masks)), key=lambda n: h[n])
        first = order[:1] if best_of_all else []
        rest = order[len(first) :]
        request.note(*(abs(h[n] - threshold) for n in rest), *(h[n] - h[order[0]] for n in rest[:1] if first))
        chosen = [*first, *(n for n in rest if h[n] <= threshold)]
        for this in complete:
            inside = [n for n in order if this.start <= masks[n] < this.end]
            if inside:
                if not set(inside) & set(chosen):
                    chosen.append(inside[0])
                    request.note(*(h[n] - h[inside[0]] for n in inside[1:2]))
                break
        request.commit(proposals, chosen)
        if ended(request, start, eos, pad):
            return request


# --- strictly causal models ------------------------------------------------------------------------------------------


def introspective(model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, stride: int) -> Request:
    """I-DLM's strided decoding (arXiv:2604.11035) at temperature 0; row i speaks of position i + 1.

    A forward holds the tokens so far, the drafts and `stride` - 1 masks. Drafts are accepted from the left while each is
    the most likely token; then one more token is taken. If all were accepted, the masks' rows draft the next ones.
    `model(tokens, visible)` returns the logits of all rows.
    """
    length = len(prompt) + new_tokens
    request = Request(torch.cat((prompt, prompt.new_full((new_tokens,), mask))), mask)
    reached, drafts = len(prompt), []
    while reached < length:
        row = torch.cat((request.tokens[:reached], torch.tensor(drafts, dtype=torch.int64)))
        row = torch.cat((row, row.new_full((stride - 1,), mask)))
        logits = model(row[None], torch.ones(len(row), len(row)).tril().bool())[0]
        said = propose(logits, list(range(len(row))), mask)
        accepted = 0
        while accepted < len(drafts) and said.token[reached - 1 + accepted] == drafts[accepted]:
            accepted += 1
        rows = [i for i in range(reached - 1, reached + accepted) if i + 1 < length]
        chosen = [getattr(said, name) for name in ("token", "probability", "margin", "entropy", "lead")]
        request.commit(
            Proposals([i + 1 for i in rows], *([x[i] for i in rows] for x in chosen)), list(range(len(rows)))
        )
        first = reached + len(drafts)  # of the masks' rows
        request.note(*said.lead[first : first + stride - 1])
        all_accepted = accepted == len(drafts)
        reached += accepted + 1
        drafts = said.token[first : first + stride - 1] if all_accepted else []
    return request


def self_speculative(model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, block: int) -> Request:
    """Linear self-speculation of Nemotron-Labs-Diffusion (arXiv:2607.05722, `linear_spec_generate`), greedy.

    The prompt, read causally, predicts the first token. Then by turns: the last token and `block` - 1 masks, which see
    what is decided and each other, draft; and the same with the drafts, read causally, says what follows each of them.
    Its tokens are taken as long as the drafts agree with them, and one more. What is decided is always read causally.

    The program drafts whole blocks, beyond the tokens asked for too; here a block ends where they do.
    """
    request = Request(torch.cat((prompt, prompt.new_full((new_tokens,), mask))), mask)
    length = len(request.tokens)
    first = propose(model(prompt[None], torch.ones(len(prompt), len(prompt)).tril().bool())[0], [len(prompt) - 1], mask)
    first.positions = [len(prompt)]
    request.commit(first, [0])
    while open_now := request.open(0, length):
        last = open_now[0] - 1
        end = min(last + block, length)
        visible = torch.ones(end, end).tril().bool()
        visible[last:] = True
        drafts = propose(model(request.tokens[None, :end], visible)[0], list(range(last, end)), mask)
        request.note(*drafts.lead[1:])
        request.num_forwards += 1
        tokens = request.tokens[:end].clone()
        tokens[last + 1 :] = torch.tensor(drafts.token[1:], dtype=torch.int64)
        said = propose(model(tokens[None], visible.tril())[0], list(range(last, end)), mask)
        said.positions = [i + 1 for i in said.positions]
        count = 0
        while last + count + 1 < end and tokens[last + count + 1] == said.token[count]:
            count += 1
        request.commit(said, [i for i in range(count + 1) if last + 1 + i < length])
    return request


def reordered(
    model: Callable, prompt: Tensor, new_tokens: int, mask: int, *, window: int, threshold: float, penalty: float
) -> Request:
    """WeDLM's streaming decoder (arXiv:2512.22737) at temperature 0, as it is published: tokens change places.

    A row of decided tokens, then the masks of the window, goes through a causal model with the positions they have in
    the text. Masks whose entropy and penalty for the distance from the first are below the threshold are filled, at
    least one. The window is `window` columns from the first mask on (published: as far as memory goes; here: to the end).
    `model(tokens, visible, positions)` returns the logits of all rows.
    """
    length = len(prompt) + new_tokens
    request = Request(torch.cat((prompt, prompt.new_full((new_tokens,), mask))), mask)
    while open_ := request.open(0, length):
        masks = [i for i in open_ if i < open_[0] + window]
        decided = [i for i in range(min(open_[0] + window, length)) if i not in masks]
        order = decided + masks
        visible = torch.ones(len(order), len(order)).tril().bool()
        logits = model(request.tokens[order][None], visible, torch.tensor(order))[0]
        proposals = propose(logits[len(decided) :], list(range(len(masks))), mask)
        proposals.positions = masks
        cost = [h + penalty * (i - masks[0]) for h, i in zip(proposals.entropy, masks)]
        request.note(*(abs(c - threshold) for c in sorted(cost)[1:]))
        take(request, proposals, [-c for c in cost], max(sum(c < threshold for c in cost), 1))
    return request
