# SPDX-License-Identifier: Apache-2.0
"""What `generate` takes for its requests beyond a configuration: more answers, a suffix, who follows, what is noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from .arguments import check_given
from .capture import steps_of
from .checks import integer
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
    """The options of a decoding with a drafter, where there is one."""
    if drafter is None:
        return options
    if "rule" in options:
        raise ValueError(
            "drafter and rule were both given, and a drafter is a rule: pass rule=dlmkernels.Drafted(drafter, …) alone"
        )
    return {**options, "rule": Drafted(drafter)}


def check_copies(count: Any, config: DecodingConfig) -> int:
    """How many answers each request gets."""
    count = integer(1)("num_return_sequences", count)
    assert isinstance(count, int)
    drawn_order = config.order_temperature > 0 or config.score == "random"
    if count > 1 and not (config.samples or config.rule.draws or drawn_order):
        raise ValueError(
            f"num_return_sequences={count} has no effect without chance: temperature is 0, and all would be equal"
        )
    return count


def check_suffix(
    model: DiffusionModel, suffix: Any, batch: int, config: DecodingConfig, special: SpecialTokens
) -> Tensor | None:  # fmt: skip
    """Tokens behind the answers, int64 `[B, K]`; None if there are none."""
    if suffix is None:
        return None
    if not isinstance(suffix, Tensor):
        try:
            suffix = torch.tensor(suffix, dtype=torch.int64, device="cpu")
        except (TypeError, ValueError):
            raise ValueError(
                f"suffix must be token ids, as many in each row: int64 [K] or [B, K]; got {suffix!r}"
            ) from None
    if suffix.dtype != torch.int64 or suffix.dim() not in (1, 2) or suffix.numel() == 0:
        raise ValueError(
            f"suffix must hold at least one token id, int64 [K] or [B, K]; got {suffix.dtype} of shape "
            f"{list(suffix.shape)}"
        )
    if suffix.dim() == 2 and len(suffix) != batch:
        raise ValueError(f"suffix must have one row for each of the {batch} requests; got {len(suffix)}")
    low, high = int(suffix.min()), int(suffix.max())
    if low < 0 or (model.vocab_size is not None and high >= model.vocab_size):
        raise ValueError(f"suffix must hold ids from 0 to {model.vocab_size} - 1; got ids from {low} to {high}")
    if special.mask >= 0 and bool((suffix == special.mask).any()):
        raise ValueError(f"suffix holds the mask token ({special.mask})")
    check_block_by_block("suffix", config.rule)
    return suffix.to(model.device).expand(batch, -1)


def check_given_tokens(
    model: DiffusionModel, given: Tensor | None, suffix: Any, lengths: Tensor, config: DecodingConfig,
    special: SpecialTokens,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """What stands in the answers from the start, suffixes included, int64 `[B, N]`, -1 where a token is wanted.

    Also how many columns each answer takes with its suffix, int32 `[B]`; `lengths` are those without.
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
    """Who follows a decoding of so many requests: None, a streamer, or several `Listeners`."""
    stops = check_stop_strings(stop_strings, tokenizer)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of a StepReport; got {type(on_step).__name__}")
    if not isinstance(trace, bool):
        raise TypeError(f"trace must be True or False; got {trace!r}")
    streamers = streamer if isinstance(streamer, Sequence) else [streamer]
    if isinstance(streamer, Sequence) and len(streamer) != batch:
        raise ValueError(f"streamer must be one for each of the {batch} requests (None for none); got {len(streamer)}")
    if streamer is not None and not isinstance(streamer, Sequence) and batch != 1:
        raise ValueError(
            f"streamer takes one request; got a batch of {batch}: pass a list of streamers, one for each request"
        )
    found = Listeners([s for s in streamers] if streamer is not None else [], on_step, stops, tokenizer, trace)
    if not found:
        return None
    return found if trace or stops or on_step is not None or batch > 1 else streamers[0]


def put_prompts(listeners: Any, prompts: Tensor, origin: Tensor) -> None:
    """Hand each streamer its request's prompt: of one request as it was passed, of several without padding."""
    if not isinstance(listeners, Listeners):
        if listeners is not None:
            listeners.put(prompts[0].cpu())
        return
    for row, streamer in enumerate(listeners.streamers):
        if streamer is not None:
            streamer.put(prompts[row, int(origin[row]) if len(prompts) > 1 else 0 :].cpu())


def equip(program: Program, listeners: Any, wishes: Wishes, graphs: bool | str) -> RequestProposer | None:
    """Let a program that has not begun do all that its requests ask for; what heeds their wishes, if they have any."""
    proposer = None
    if wishes:
        proposer = RequestProposer.install(program, [wishes] * len(program.state.tokens))
        proposer.raises = True
    records = isinstance(listeners, Listeners) and listeners.records
    if records and graphs is True:
        raise ValueError("graphs=True cannot be used with trace=True: what a captured step moves is not told")
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
    """The result as the requests have asked for it."""
    if isinstance(listeners, Listeners):
        out = listeners.cut(out, pad)
        if isinstance(listeners.recorder, Recorder):
            out = listeners.recorder.recorded(out)
    return out if proposer is None else proposer.recorded(out)
