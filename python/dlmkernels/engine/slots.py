# SPDX-License-Identifier: Apache-2.0
"""A lane whose rows are replaced one by one: a slot gets the next request as soon as its current one is done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..decoding.capture import Steps
from ..decoding.config import DecodingConfig
from ..decoding.constrained_rows import ConstraintOfEachRow
from ..decoding.ends import ENDS, end_table
from ..decoding.features import D2Cache, features_of
from ..decoding.parameters import parameters_of
from ..decoding.poll import OpenCount
from ..decoding.processing import RequestProposer, Wishes
from ..decoding.programs import Task
from ..decoding.programs.blocks import BlockAfterBlock
from ..decoding.schedule import Grid
from ..decoding.state import State
from ..models.adapt import DiffusionModel, EncoderDecoderModel
from .alike import ends_width, has_fixed_length, together
from .lane import Lane, StepsOf
from .request import Request


def goes_by_itself(model: DiffusionModel, config: DecodingConfig) -> bool:
    """Return whether rows of this decoding can be replaced one by one while others continue."""
    return (
        config.rule.by_block
        and config.rule.noise != "continuous"
        and not isinstance(features_of(config.cache), D2Cache)
        and not isinstance(model, EncoderDecoderModel)
        and not getattr(model, "_rotaries", None)
        and not getattr(model, "_by_length", False)
    )


def grid_of(model: DiffusionModel, config: DecodingConfig, prompt: int, length: int) -> Grid:
    """Return the block grid of one request whose prompt begins in the first column, as `generate` would make it."""
    origin = torch.zeros(1, dtype=torch.int32, device="cpu")
    return Grid.of(config, origin, prompt, prompt + length, _grows(model, config))


def _grows(model: DiffusionModel, config: DecodingConfig) -> bool:
    return config.block_grid == "absolute" or model.family.whole_blocks


class SlotLane(Lane):
    """Requests in the rows of one `BlockAfterBlock` program, each starting at the first column of its row.

    Parameters
    ----------
    like : Request
        Example of the requests to come, which may differ from it only in the options described in `alike`.
    rows, columns : int
        Number of slots, and length of each in tokens.
    steps_of : callable
        Creates the object that runs the steps of a program.
    may_be_few : bool
        Whether a forward pass may take only the rows that need it.
    """

    def __init__(
        self, model: DiffusionModel, like: Request, rows: int, columns: int, steps_of: StepsOf, may_be_few: bool
    ):  # fmt: skip
        super().__init__(rows)
        self.model, self.special = model, like.special
        length = len(like.answer) if has_fixed_length(like.config) else columns
        self.config = together([like.config] * rows, [length] * rows)
        if like.config.constraint is not None:
            self.constraints = ConstraintOfEachRow.of(like.config.constraint, rows)
            self.config = dataclasses.replace(self.config, constraint=self.constraints).as_preset()
        device = model.device
        self.grid = self._plan(length, columns, device)
        self._columns = columns + self.grid.length * self.grid.grows
        self._ends_width = ends_width(like.config, like.special)
        parameters = self._parameters([like] * rows, self.config)
        self.state = State.empty(rows, self._columns, device, parameters=parameters)
        self._starts_at = [0] * rows
        task = Task(
            model, self.state, self.config, self.special, self.grid, 0, columns, rows_change=True, may_be_few=may_be_few
        )
        self.program = self._blocks = BlockAfterBlock(task)
        # end tokens need no lookup by row until a request with other end tokens arrives
        self.program.reads_own_ends = False
        if like.wishes:
            self.processed = RequestProposer.install(self.program, [like.wishes] * rows)
            for row in range(rows):
                self.processed.set(row, Wishes())
        is_on_host = bool(like.wishes.processors) or self.constraints is not None
        self.steps = Steps(self.program, not may_be_few) if is_on_host else steps_of(self.program)
        #: by row, the number of steps submitted when its request was admitted; only later reports describe it
        self._known_from = [-1] * rows
        self._submitted = 0
        self._is_in_block = [False] * rows
        self._empty(range(rows))
        self.counts = OpenCount(*self.program.begin().tolist())
        self._blocks.forward.reserve()

    def _plan(self, length: int, columns: int, device: torch.device) -> Grid:
        """Return a grid for all rows. The position of each row's blocks is set when its request is admitted."""
        config, rows = self.config, len(self.owner)
        grows = _grows(self.model, config)
        if not has_fixed_length(config):
            return Grid.for_any(config, rows, columns, grows, device)
        # all requests have this answer length, so the steps of the schedule are divided among the same blocks
        grid = Grid.of(config, torch.zeros(rows, dtype=torch.int32, device=device), 0, length, grows)
        grid = dataclasses.replace(grid, span=(0, columns))
        if config.block_grid == "absolute":  # the first block may hold the end of the prompt
            count = grid.count + 1
            grid = dataclasses.replace(grid, count=count, width=count * grid.length)
        return grid

    def _parameters(self, requests: Sequence[Request], config: DecodingConfig) -> dict[str, Tensor]:
        """Return the per-request parameters of some requests; `config` has one value for each of them."""
        device = self.model.device
        found = parameters_of(config, len(requests), device)
        if self._ends_width:
            found[ENDS] = end_table([request.special.eos for request in requests], device, self._ends_width)
        return found

    # --- admission and release ----------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        return self.owner.count(None)

    def admit(self, requests: Sequence[Request]) -> None:
        rows = [row for row, owner in enumerate(self.owner) if owner is None][: len(requests)]
        mask, device = max(self.special.mask, 0), self.state.tokens.device
        tokens = torch.full((len(rows), self._columns), self.special.pad, dtype=torch.int64, device="cpu")
        is_open = torch.zeros(tokens.shape, dtype=torch.bool, device="cpu")
        places = []
        for k, (row, request) in enumerate(zip(rows, requests)):
            start, end = len(request.prompt), len(request.prompt) + len(request.answer)
            answer = torch.tensor(request.answer, dtype=torch.int64, device="cpu")
            whole = int(grid_of(self.model, request.config, start, end - start).ends)
            tokens[k, :start] = torch.tensor(request.prompt, dtype=torch.int64, device="cpu")
            tokens[k, start:whole] = mask
            tokens[k, start:end] = torch.where(answer < 0, mask, answer)
            is_open[k, start:whole] = True
            is_open[k, start:end] = answer < 0
            places.append((start, end))
            self._starts_at[row], self.owner[row] = start, request
            if self.processed is not None:
                self.processed.set(row, request.wishes)
            if self.constraints is not None and request.config.constraint is not None:
                width = grid_of(self.model, request.config, start, end - start).width
                own = self.state.tokens[row : row + 1, :width]
                place = request.place(self.model.vocab_size)
                self.constraints.set(row, request.config.constraint, place, end - start, own)
        seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device="cpu")
        parameters = self._parameters(requests, together([request.config for request in requests]))
        if self._ends_width and any(set(request.special.eos) != set(self.special.eos) for request in requests):
            self.program.reads_own_ends = True
        self._fill(rows, tokens.to(device), is_open.to(device), places, parameters, seeds.to(device))
        self._renew(rows)

    def release(self, row: int, is_done: bool) -> None:
        self.owner[row] = None
        if self.constraints is not None:
            self.constraints.clear(row)
        if not is_done:
            self._empty([row])
            self._renew([row])

    def start(self, row: int) -> int:
        return self._starts_at[row]

    def _empty(self, rows: Iterable[int]) -> None:
        """Clear some rows, so that nothing is decoded in them."""
        rows = list(rows)
        tokens = torch.full((len(rows), self._columns), self.special.pad, device=self.state.tokens.device)
        index = torch.tensor(rows, device=self.state.tokens.device)
        parameters = {name: values[index] for name, values in self.state.parameters.items()}
        self._fill(rows, tokens, torch.zeros_like(tokens, dtype=torch.bool), [(0, 1)] * len(rows), parameters)

    def _fill(
        self, rows: Iterable[int], tokens: Tensor, is_open: Tensor, places: Sequence[tuple[int, int]],
        parameters: Mapping[str, Tensor], seeds: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the new contents of some rows. `places` holds the first and the end column to decode of each row."""
        device = self.state.tokens.device
        index = torch.tensor(list(rows), dtype=torch.int64, device="cpu").to(device)
        start, end = torch.tensor(places, dtype=torch.int32, device="cpu").to(device).T
        origin = torch.zeros_like(start)
        self.grid.place(index, origin, start, end)
        self.state.admit(index, tokens, is_open, origin, self.grid.ends[index], seeds, parameters)

    def _renew(self, rows: Sequence[int]) -> None:
        """Tell the program that the contents of some rows have been replaced."""
        self._blocks.renew(torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.state.tokens.device))
        for row in rows:
            self._known_from[row], self._is_in_block[row] = self._submitted, False

    # --- steps --------------------------------------------------------------------------------------------------------

    def _report(self) -> tuple[int, ...]:
        """Return the last report read, adjusted to the current requests.

        A row without a request counts as done (-1). A row whose request was admitted after the report counts as waiting
        to enter a block (0).
        """
        report = self.counts.known
        number, rows = self._submitted - self.counts.behind, len(self.owner)
        own = tuple(
            -1 if owner is None else n if number > known else 0
            for n, owner, known in zip(report, self.owner, self._known_from)
        )
        return own + report[rows:]

    def poll(self) -> list[int]:
        self.counts.latest()
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
        report, rows = self._report(), len(self.owner)
        form = self.program.form(report, self.counts.behind)
        if form is None:
            self.seconds = 0.0
            return False
        self.width = rows if form.rows is None else form.rows
        works = [n > 0 and (form.rows is None or phase == form.phase) for n, phase in zip(report[:rows], report[rows:])]
        self.working = min(sum(works), self.width)
        self.make(form, form.kind in ("append", "denoise"))
        self._submitted += 1
        return True
