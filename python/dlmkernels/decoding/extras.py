# SPDX-License-Identifier: Apache-2.0
"""Arguments of `generate` beyond the configuration: several answers, a suffix, streamers, callbacks, records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from .arguments import as_ids, check_given, check_is_streamer
from .capture import steps_of
from .checks import id_range, integer
from .config import DecodingConfig, SpecialTokens
from .finality import finished_columns
from .output import DecodingOutput
from .processing import RequestProposer, Wishes
from .programs import Program
from .programs.blocks import BlockAfterBlock
from .recording import Recorder
from .resolve import check_block_by_block
from .rules import Drafted
from .stops import check_stop_strings
from .streaming import Listeners


def drafting(drafter: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the rule that a drafter stands for; unchanged if `drafter` is None."""
    if drafter is None:
        return options
    if "rule" in options:
        raise ValueError("drafter and rule cannot both be given: pass only rule=dlmkernels.Drafted(drafter, …)")
    return {**options, "rule": Drafted(drafter)}


def check_copies(count: Any, config: DecodingConfig) -> int:
    """Check `num_return_sequences`, the number of answers to each request, and return it."""
    count = integer(1)("num_return_sequences", count)
    assert isinstance(count, int)
    drawn_order = config.order_temperature > 0 or config.score == "random"
    if count > 1 and not (config.samples or config.rule.draws or drawn_order):
        raise ValueError(
            f"num_return_sequences={count} needs randomness: temperature is 0, so all answers would be equal. Pass a "
            "temperature above 0"
        )
    return count


def check_suffix(
    model: DiffusionModel, suffix: Any, batch: int, config: DecodingConfig, special: SpecialTokens
) -> Tensor | None:  # fmt: skip
    """Check the tokens that follow the answers; return them as int64 `[B, K]`, or None if there are none."""
    if suffix is None:
        return None
    suffix = as_ids("suffix", suffix, torch.device("cpu"))
    if suffix.dtype != torch.int64 or suffix.dim() not in (1, 2) or suffix.numel() == 0:
        raise ValueError(
            f"suffix must hold at least one token id, int64 [K] or [B, K]; got {suffix.dtype} of shape "
            f"{list(suffix.shape)}"
        )
    if suffix.dim() == 2 and len(suffix) != batch:
        raise ValueError(f"suffix must have one row for each of the {batch} requests; got {len(suffix)}")
    low, high = int(suffix.min()), int(suffix.max())
    if low < 0 or (model.vocab_size is not None and high >= model.vocab_size):
        raise ValueError(f"suffix must hold ids {id_range(model.vocab_size)}; got ids from {low} to {high}")
    if special.mask >= 0 and bool((suffix == special.mask).any()):
        raise ValueError(f"suffix holds the mask token ({special.mask})")
    check_block_by_block("suffix", config.rule)
    return suffix.to(model.device).expand(batch, -1)


def check_given_tokens(
    model: DiffusionModel, given: Any, suffix: Any, lengths: Tensor, config: DecodingConfig,
    special: SpecialTokens,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Return the fixed tokens of the answers and suffixes, and the length of each answer with its suffix.

    The tokens are int64 `[B, N]`, -1 where one is to be decoded; None if there are none. The lengths are int32 `[B]`,
    as are the `lengths` of the answers without suffix.
    """
    batch = len(lengths)
    if given is not None:
        given = check_given(model, given, batch, config, special)
    behind = check_suffix(model, suffix, batch, config, special)
    if behind is None:
        return given, lengths
    longest = int(lengths.max())
    whole = torch.full((batch, longest + behind.shape[1]), -1, dtype=torch.int64, device=model.device)
    if given is not None:
        whole[:, :longest] = given
    place = lengths.long()[:, None] + torch.arange(behind.shape[1], device=model.device)
    return whole.scatter(1, place, behind), lengths + behind.shape[1]


def listeners_of(
    streamer: Any, batch: int, on_step: Any = None, stop_strings: Any = None, tokenizer=None, trace: Any = False
) -> Any:  # fmt: skip
    """Return what follows the decoding of `batch` requests: None, a single streamer, or `Listeners`."""
    stops = check_stop_strings(stop_strings, tokenizer)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be callable with a StepReport; got {type(on_step).__name__}")
    if not isinstance(trace, bool):
        hint = f": pass trace=True, then call out.trace.html({trace!r})" if isinstance(trace, str) else ""
        raise TypeError(f"trace must be True or False; got {trace!r}{hint}")
    streamers = streamer if isinstance(streamer, Sequence) else [streamer]
    if isinstance(streamer, Sequence) and len(streamer) != batch:
        raise ValueError(f"streamer must have an entry (or None) for each of the {batch} requests; got {len(streamer)}")
    if streamer is not None and not isinstance(streamer, Sequence) and batch != 1:
        raise ValueError(
            f"streamer can follow only one request; got a batch of {batch}: pass a list with one streamer per request"
        )
    for one in streamers:
        if one is not None:
            check_is_streamer(one)
    found = Listeners([s for s in streamers] if streamer is not None else [], on_step, stops, tokenizer, trace)
    if not found:
        return None
    return found if trace or stops or on_step is not None or batch > 1 else streamers[0]


def put_prompts(listeners: Any, prompts: Tensor, origin: Tensor) -> None:
    """Pass each streamer the prompt of its request: as given for a single request, without padding for several."""
    if not isinstance(listeners, Listeners):
        if listeners is not None:
            listeners.put(prompts[0].cpu())
        return
    for row, streamer in enumerate(listeners.streamers):
        if streamer is not None:
            streamer.put(prompts[row, int(origin[row]) if len(prompts) > 1 else 0 :].cpu())


def equip(program: Program, listeners: Any, wishes: Wishes, graphs: bool | str) -> RequestProposer | None:
    """Equip a program, before it begins, for its requests; return the proposer that serves their wishes, if any."""
    proposer = None
    if wishes:
        proposer = RequestProposer.install(program, [wishes] * len(program.state.tokens))
        proposer.raises = True
    records = isinstance(listeners, Listeners) and listeners.records
    if records and graphs is True:
        raise ValueError("graphs=True cannot be used with trace=True: captured steps do not report what they move")
    steps_of(program, False if wishes.processors or records else graphs).install()
    if isinstance(listeners, Listeners):
        listeners.recorder = Recorder(program) if records else None
        listeners.attend(
            program.state, program.start, program.grid.asked.tolist(),
            lambda is_open: finished_columns(program, is_open),
            isinstance(program, BlockAfterBlock),
        )  # fmt: skip
    return proposer


def completed(out: DecodingOutput, listeners: Any, proposer: RequestProposer | None, pad: int) -> DecodingOutput:
    """Return the result cut at stop strings, with the records that the requests asked for."""
    if isinstance(listeners, Listeners):
        out = listeners.cut(out, pad)
        if isinstance(listeners.recorder, Recorder):
            out = listeners.recorder.recorded(out)
    return out if proposer is None else proposer.recorded(out)
