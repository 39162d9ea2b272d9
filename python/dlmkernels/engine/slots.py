# SPDX-License-Identifier: Apache-2.0
"""A program whose rows come and go: a slot is given the next request as soon as its own is done.

All that is known of the inside of `BlockAfterBlock` here is how a row is given another request.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoding.capture import RecordedSteps, Steps
from ..decoding.config import DecodingConfig
from ..decoding.parameters import parameters_of
from ..decoding.poll import OpenCount
from ..decoding.processing import RequestProposer, Wishes
from ..decoding.programs import Task
from ..decoding.programs.blocks import BlockAfterBlock
from ..decoding.schedule import Grid
from ..decoding.state import State
from ..models.adapt import DiffusionModel, EncoderDecoderModel
from .alike import has_fixed_length, together
from .lane import Lane, StepsOf
from .narrow import NarrowModel, bucket, can_be_narrowed
from .request import Request


def goes_by_itself(model: DiffusionModel, config: DecodingConfig) -> bool:
    """Whether the rows of such a decoding can come and go by themselves."""
    rule = config.rule
    return (
        rule.by_block
        and config.cache == "none"
        and not config.seeded
        and config.cfg_scale == 0
        and config.constraint is None
        and rule.noise == "mask"
        and rule.slots != "canvas"
        and not rule.token_ids
        and not isinstance(model, EncoderDecoderModel)
        and not getattr(model, "_by_length", False)
    )


def grid_of(model: DiffusionModel, config: DecodingConfig, prompt: int, length: int) -> Grid:
    """The grid of one request whose prompt begins in the first column, as `generate` would make it."""
    origin = torch.zeros(1, dtype=torch.int32, device="cpu")
    grows = config.block_grid == "absolute" or model.family.whole_blocks
    return Grid.of(config, origin, prompt, prompt + length, grows)


class SlotLane(Lane):
    """Requests in the rows of one `BlockAfterBlock`, each from the first column of its row on.

    Parameters
    ----------
    like : Request
        One of those that are to come: they differ from it in what `alike` names.
    rows, columns : int
        How many slots there are, and how long each is.
    """

    def __init__(
        self, model: DiffusionModel, like: Request, rows: int, columns: int, steps_of: StepsOf
    ):  # fmt: skip
        super().__init__(rows)
        self.model, self.special = model, like.special
        self.config = together([like.config] * rows)
        device = model.device
        self.grid = self._plan(len(like.answer), columns, device)
        # A spare column: no request fills its row, so that what forwards may see is always said by a tensor.
        self._columns = max(columns, self.grid.width) + 1
        parameters = parameters_of(self.config, rows, device)
        self.state = State.empty(rows, self._columns, device, parameters=parameters)
        everywhere = torch.ones(rows, self._columns, dtype=torch.bool, device=device)
        everywhere[:, self.grid.width :] = False  # a window must have room for any request
        places = torch.stack((self.grid.first, self.grid.ends, self.grid.asked), 1).tolist()
        self._fill(range(rows), torch.zeros_like(everywhere).long(), everywhere, places, parameters)
        self._narrow = NarrowModel(model, rows, self._columns) if can_be_narrowed(model) else None
        forwarded: Any = model if self._narrow is None else self._narrow
        task = Task(forwarded, self.state, self.config, self.special, self.grid, 0, columns)
        self.program = self._blocks = BlockAfterBlock(task)
        if like.wishes:
            self.processed = RequestProposer.install(self.program, [like.wishes] * rows)
            for row in range(rows):
                self.processed.set(row, Wishes())
        self.steps = Steps(self.program) if like.wishes.processors else steps_of(self.program)
        if self.steps.is_fixed:
            self._narrow = None
        self._starts_at, self._ends_at = [0] * rows, [1] * rows
        #: number of the report from which on each row's number speaks of its request
        self._known_from = [-1] * rows
        self._submitted = 0
        self._is_in_block = [False] * rows
        self._counted_done: set[int] = set()
        self._empty(range(rows))
        self.counts = OpenCount(*self.program.begin().tolist())

    def _plan(self, length: int, columns: int, device: torch.device) -> Grid:
        """The grid by which all rows are planned; where each row's blocks stand is written at its admission."""
        config, rows = self.config, len(self.owner)
        grows = config.block_grid == "absolute" or self.model.family.whole_blocks
        if not has_fixed_length(config):
            return Grid.for_any(config, rows, 0, columns, grows, device)
        origin = torch.zeros(rows, dtype=torch.int32, device=device)
        grid = Grid.of(config, origin, 0, length, grows)
        if config.block_grid == "absolute":  # the first block may hold the end of the prompt
            count = grid.count + 1
            grid = dataclasses.replace(grid, count=count, width=count * grid.length)
        return grid

    # --- requests come and go -----------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        return self.owner.count(None)

    def admit(self, requests: Sequence[Request]) -> None:
        rows = [row for row, owner in enumerate(self.owner) if owner is None][: len(requests)]
        tokens = torch.full((len(rows), self._columns), self.special.pad, dtype=torch.int64, device="cpu")
        is_open = torch.zeros(tokens.shape, dtype=torch.bool, device="cpu")
        places = []
        for k, request in enumerate(requests):
            start, length = len(request.prompt), len(request.answer)
            grid = grid_of(self.model, self.config, start, length)
            first, end = int(grid.first), int(grid.ends)
            answer = torch.tensor(request.answer, dtype=torch.int64, device="cpu")
            tokens[k, :start] = torch.tensor(request.prompt, dtype=torch.int64, device="cpu")
            tokens[k, start:end] = max(self.special.mask, 0)
            tokens[k, start : start + length] = torch.where(answer < 0, max(self.special.mask, 0), answer)
            is_open[k, start:end] = True
            is_open[k, start : start + length] &= answer < 0
            # its end is counted from that of the prompt, as everything is that is planned
            places.append((first, end, length))
            self._starts_at[rows[k]], self._ends_at[rows[k]] = start, end
            self.owner[rows[k]] = request
            if self.processed is not None:
                self.processed.set(rows[k], request.wishes)
        device = self.state.tokens.device
        seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device="cpu")
        parameters = parameters_of(together([request.config for request in requests]), len(requests), device)
        self._fill(rows, tokens.to(device), is_open.to(device), places, parameters, seeds.to(device))
        self._renew(rows)

    def release(self, row: int, is_done: bool) -> None:
        self.owner[row] = None
        if not is_done:
            self._empty([row])
            self._renew([row])

    def start(self, row: int) -> int:
        return self._starts_at[row]

    def _empty(self, rows: Iterable[int]) -> None:
        """Nothing is to be decoded in some rows, and next to nothing to be seen."""
        rows = list(rows)
        tokens = torch.full((len(rows), self._columns), self.special.pad, device=self.state.tokens.device)
        index = torch.tensor(rows, device=self.state.tokens.device)
        parameters = {name: values[index] for name, values in self.state.parameters.items()}
        self._fill(rows, tokens, torch.zeros_like(tokens, dtype=torch.bool), [(0, 1, 1)] * len(rows), parameters)

    def _fill(
        self, rows: Iterable[int], tokens: Tensor, is_open: Tensor, places: Sequence[Sequence[int]],
        parameters: Mapping[str, Tensor], seeds: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write what the rows hold from now on; of their grids, the places are `first`, `ends` and `asked`."""
        device = self.state.tokens.device
        index = torch.tensor(list(rows), dtype=torch.int64, device="cpu").to(device)
        place = torch.tensor(places, dtype=torch.int32, device="cpu").to(device)
        for own, values in zip((self.grid.first, self.grid.ends, self.grid.asked), place.T):
            own.index_copy_(0, index, values)
        nothing = torch.zeros_like(index, dtype=torch.int32)
        self.state.admit(index, tokens, is_open, nothing, place[:, 1], seeds, parameters)

    def _renew(self, rows: Sequence[int]) -> None:
        """Let the program take notice of rows that hold something else."""
        self._blocks.renew(torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.state.tokens.device))
        for row in rows:
            self._known_from[row], self._is_in_block[row] = self._submitted, False
            if row in self._counted_done:
                self._counted_done.discard(row)
                self._blocks.forms.num_done -= 1

    # --- steps --------------------------------------------------------------------------------------------------------

    def _report(self) -> tuple[int, ...]:
        """The newest report that may be read; 0, for waiting, where it speaks of a request that is no more."""
        report = self.counts.latest()
        number = self._submitted - self.counts.behind
        return tuple(n if number > known else 0 for n, known in zip(report, self._known_from))

    def poll(self) -> list[int]:
        done = []
        for row, (n, request) in enumerate(zip(self._report(), self.owner)):
            if request is None:
                continue
            if n > 0:
                self._is_in_block[row] = True
            elif self._is_in_block[row]:
                self._is_in_block[row] = False
                request.first_block = request.first_block or time.perf_counter()
            if n == -1:
                done.append(row)
        return done

    def advance(self) -> bool:
        report, forms = self._report(), self._blocks.forms
        is_entry = forms.reports - self.counts.behind == forms.entered
        form = self.program.form(report, self.counts.behind)
        if is_entry:
            self._counted_done = {row for row, n in enumerate(report) if n == -1}
        if form is None:
            self.seconds = 0.0
            return False
        self.working = sum(n > 0 for n in report)
        self.make(form, self._choose(report) if self.program.denoises(form) else None)
        self._submitted += 1
        return True

    def _choose(self, report: tuple[int, ...]) -> Hashable:
        """Let the next forward take the rows that may have something to decode; how many there are."""
        self.width = len(self.owner)
        if self._narrow is None:
            return None
        rows = [row for row, n in enumerate(report) if n >= 0 and self.owner[row] is not None]
        columns = max((self._ends_at[row] for row in rows), default=1)
        if isinstance(self.steps, RecordedSteps):
            others = [row for row in range(len(self.owner)) if row not in rows]
            rows += others[: bucket(len(rows), len(self.owner)) - len(rows)]
            columns = self._columns
        self._narrow.take(sorted(rows), columns)
        self.width = self._narrow.width
        return self.width
