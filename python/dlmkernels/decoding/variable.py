# SPDX-License-Identifier: Apache-2.0
"""The loop of the rules that change the length: each request grows and shrinks on a canvas of the largest length."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel
from .canvas import FROZEN, Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, commit_tokens
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer, StepOptions
from .schedule import Grid
from .streaming import Stream
from .streams import VariableLength

#: Slots that `ops.splice_` takes.
MOST_SLOTS = 4096


@torch.no_grad()
def decode_variable(
    model: DiffusionModel,
    canvas: Canvas,
    config: DecodingConfig,
    special: SpecialTokens,
    grid: Grid,
    start: int,
    end: int,
    streamer=None,
    prompt_embeds: Tensor | None = None,
) -> DecodingOutput:
    """Decode what is open in columns `[start, end)`; the canvas has the columns that this may take."""
    rule = config.rule
    assert isinstance(rule, VariableLength)
    _check(config, special)
    options = StepOptions(Proposer(model, canvas, config, special), canvas, config)
    most = config.max_new_tokens
    # Behind `length` a row is padding; it may not become longer than `limit`. Nothing moves left of `first`.
    length = canvas.end
    if rule.decodes == "continuations":
        length.fill_(start + rule.first_masks(most))
        limit = torch.full_like(length, start + most)
        first = torch.full_like(length, start)
        _close(canvas, length, special.pad)
    else:
        limit = length + most - canvas.is_open.sum(1, dtype=torch.int32)
        first = canvas.is_open.int().argmax(1).int()
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds, limit)
    columns = torch.arange(canvas.tokens.shape[1], dtype=torch.int32, device=first.device)
    masks, longest, widest = torch.stack(
        (canvas.is_open.sum(1).amax(), length.amax(), (torch.where(canvas.is_open, columns, 0).amax(1) - first).amax())
    ).tolist()
    widest = most if rule.decodes == "continuations" else widest + most
    block_length = min(config.block_length or widest, widest)
    if block_length > MOST_SLOTS or (rule.slots == "canvas" and most > MOST_SLOTS):
        raise ValueError(
            f"rule {type(rule).__name__} edits windows of up to {MOST_SLOTS} positions: give a smaller block_length or "
            f"max_new_tokens; got {config.block_length} and {most}"
        )
    inserted = torch.zeros_like(length)
    memory: dict[str, Tensor] = {}
    stream, unfinished = Stream(streamer, canvas, start), Unfinished(canvas, rule)
    counts = OpenCount(masks, longest)
    for index in range(rule.max_forwards(masks, most)):
        capacity, rows = counts.latest()
        if capacity == 0:
            break
        # A count that is late may lack what each of the steps since then can have inserted.
        capacity = min(capacity + counts.behind * rule.most_growth, block_length)
        rows = min(rows + counts.behind * rule.most_growth, canvas.tokens.shape[1])
        is_open = canvas.is_open
        working = is_open.any(1)
        used = (columns[:rows] < length[:, None]) & working[:, None]
        hidden = forward.at(columns[:rows].expand(len(first), -1), length.clamp(max=rows), used)
        offset = (is_open.int().argmax(1).int() - first).clamp(min=0)
        block = first + offset // block_length * block_length
        in_block = canvas.columns(block, block_length)
        if rule.slots == "open":
            base, width = block, block_length
            window = canvas.window(in_block, capacity)
        else:
            base, width = first, rows - start
            window = canvas.free_window(canvas.columns(first, width), working)
        row = forward.speaker_of(window.positions).clamp(max=rows - 1).long()
        picked = hidden.gather(1, row[:, :, None].expand(-1, -1, hidden.shape[2]))
        logits = model.logits(picked.flatten(0, 1))
        room = torch.minimum(limit - length, rule.max_insertions(most) - inserted)
        rule.restrict(logits.unflatten(0, row.shape), room)
        open_now = canvas.open_in(in_block).sum(1, dtype=torch.int32)
        step = options.step(logits, window, block, block_length, index, 1, open_now, open_now, 0.0, memory, room)
        unfinished.see(step)
        action = rule.act(step)
        assert action.commit is not None and action.insert is not None and action.remove is not None
        commit_tokens(canvas, config, special, window.positions, step.token, action.commit, step.confidence)
        place = torch.where(window.used, window.positions - base[:, None], width).long()
        inserted += _splice(
            canvas, length, base, special, _by_place(action.insert, place, width),
            _by_place(action.remove, place, width),
        )  # fmt: skip
        if action.append is not None:
            append = action.append.masked_fill(~working, 0)[:, None]
            inserted += _splice(canvas, length, length.clone(), special, append.contiguous(), None)
        still_open = canvas.is_open.sum(1, dtype=torch.int32)
        counts.submit(torch.stack((still_open.amax(), (length * (still_open > 0)).amax())))
        stream.step(length)
    stream.finish(length)
    return output_of(canvas, start, max(int(length.amax()), start), unfinished, length)


def _splice(
    canvas: Canvas, length: Tensor, start: Tensor, special: SpecialTokens, insert: Tensor, remove: Tensor | None
) -> Tensor:
    """Insert masks before slots of the columns from `start` on, and take others out; how many were inserted `[B]`."""
    return ops.splice_(
        canvas.tokens, start, insert=insert, remove=remove, length=length, state=canvas.state,
        commit_step=canvas.commit_step, commit_confidence=canvas.confidence, fill_token_id=special.mask,
        pad_token_id=special.pad,
    ).info[:, 0]  # fmt: skip


def _by_place(values: Tensor, place: Tensor, width: int) -> Tensor:
    """Values `[B, W]` of the slots at their places int64 `[B, W]`, `[B, width]`; 0 elsewhere. `width` is no place."""
    return values.new_zeros(len(values), width + 1).scatter(1, place, values)[:, :-1].contiguous()


def _close(canvas: Canvas, length: Tensor, pad: int) -> None:
    """Make padding of what stands from column `length` int32 `[B]` on."""
    behind = torch.arange(canvas.tokens.shape[1], device=length.device) >= length[:, None]
    canvas.tokens.masked_fill_(behind, pad)
    canvas.state.masked_fill_(behind, FROZEN)


def _check(config: DecodingConfig, special: SpecialTokens) -> None:
    name = type(config.rule).__name__
    if config.attention != "full" or config.cache != "none":
        raise ValueError(
            f"rule {name} needs attention='full' and cache='none'; got {config.attention!r} and {config.cache!r}"
        )
    for option in ("cfg_scale", "sub_block_length"):
        if getattr(config, option):
            raise ValueError(f"{option} cannot be used with rule {name}; got {getattr(config, option)!r}")
    if config.rule.decodes == "infillings" and config.eos_policy != "none":
        raise ValueError(
            f"rule {name} needs eos_policy='none', since text may stand behind what is filled in; got "
            f"{config.eos_policy!r}"
        )
    if config.rule.decodes == "continuations" and not special.eos:
        raise ValueError(f"eos_token_id is needed by rule {name}: the model's configuration has none")
