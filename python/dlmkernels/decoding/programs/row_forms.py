# SPDX-License-Identifier: Apache-2.0
"""Host side of decoding in which rows enter their blocks independently: choosing the form of the next step.

A row's phase is the kind of forward pass it needs next; the device determines and reports it. A step takes rows of one
phase, at most as many as its form allows.
"""

from __future__ import annotations

from collections import deque

from ..block_forward import APPEND, BlockForward
from ..config import DecodingConfig
from .block_forms import Form

#: Canvas widths of steps are rounded up to a multiple of this.
GRAIN = 16


class RowForms:
    """Chooses the form of the next step from earlier reports.

    A report holds three groups of S numbers, one number per row in each group:

    - the number of open positions in the row's block (at least 1 while the row is in a block); 0 if the row is waiting
      to enter its next block; -1 if it has nothing left to do;
    - the row's phase;
    - the number of columns, besides those of the block, that a forward pass in this phase has to take.

    Parameters
    ----------
    config : DecodingConfig
    least_steps : int
        Number of steps after which a block ends in any case, minimized over all block lengths.
    forward : BlockForward
    slots : int
        Number of slots in the window of a row.
    may_be_few : bool
        Whether a forward pass may take only some of the rows. If False, it always takes all rows, whatever they need,
        so that the size of its matrix products is constant.
    """

    def __init__(self, config: DecodingConfig, least_steps: int, forward: BlockForward, slots: int, may_be_few: bool):
        self.forward, self.slots, self.may_be_few = forward, slots, may_be_few
        self.least_steps = least_steps
        #: whether rows have different phases, which must be told apart even when all rows are forwarded
        self.has_phases = config.cache != "none" or forward.commits_apart
        self.columns = forward.columns_of(None)
        #: the phase of a row in the middle of a block, except for refreshes
        self.usual = forward.usual_phase

    def begin(self, ends: list[int]) -> None:
        """Reset the host's knowledge: all rows have just entered a block, and their requests end at columns `ends`."""
        self.ends = ends
        #: forms of the steps whose reports have not arrived yet
        self._sent: deque[Form] = deque()
        #: upper bound of the steps each row has taken in its block; whether the last forward had a special phase
        self._taken = [0] * len(ends)
        self._was_special = False

    def renew(self, rows: list[int], ends: list[int]) -> None:
        """Note that `rows` hold new requests, which end at columns `ends`."""
        for row, end in zip(rows, ends, strict=True):
            self.ends[row] = end

    def next(self, report: tuple[int, ...], behind: int) -> Form | None:
        """Return the form of the next step, or None if there is nothing left to do."""
        count = len(self.ends)
        open_now, phase, pending = (report[i * count : (i + 1) * count] for i in range(3))
        while len(self._sent) > behind:
            self._sent.popleft()
        enters = any(form.kind == "enter" for form in self._sent)
        if 0 in open_now and not enters:
            self._taken = [0 if n == 0 else taken for n, taken in zip(open_now, self._taken)]
            return self._send(Form("enter", columns=self.columns))
        by_phase: dict[int, list[int]] = {}
        for row, n in enumerate(open_now):
            if n > 0:
                by_phase.setdefault(phase[row], []).append(row)
        if not by_phase and not enters:
            return None
        chosen = self._choose(by_phase)
        if chosen is None:
            return self._send(Form("look"))
        rows = by_phase[chosen]
        return self._send(self._form(chosen, rows, sum(open_now[r] for r in rows), max(pending[r] for r in rows)))

    def _choose(self, by_phase: dict[int, list[int]]) -> int | None:
        """Choose the phase whose rows go next; None if reports of steps in flight are needed first.

        Rows with a new prompt or a refresh go first, but not twice in a row while other rows are waiting.
        """
        usual = self.usual
        sent = {form.phase for form in self._sent if form.kind in ("append", "denoise")} - {usual}
        special = sorted(phase for phase in by_phase if phase != usual and phase not in sent)
        if special and not (self._was_special and usual in by_phase):
            return special[0]
        return usual if usual in by_phase else None

    def _form(self, phase: int, rows: list[int], num_open: int, pending: int) -> Form:
        count, self._was_special = len(self.ends), phase != self.usual
        may_be_few = self.may_be_few and self.forward.takes_rows
        taking = len(rows) if may_be_few else count
        # With steps in flight, rows may have just come into the phase, with the maximum number of open positions.
        head = taking * self.slots if self._sent else min(num_open, count * self.slots)
        is_limited = any(self._taken[row] >= self.least_steps for row in rows)
        for row in rows:
            self._taken[row] += 1
        some = taking if self.has_phases or taking < count else None
        # If all rows are taken, they include rows that have entered a block since the report.
        ends = self.ends if some is None else [self.ends[row] for row in rows]
        width = -(-max(ends) // GRAIN) * GRAIN
        is_narrow = self.forward.takes_canvas(phase) and self.forward.rows_change and width < self.forward.length
        kind = "append" if phase == APPEND and self.forward.commits_apart else "denoise"
        part = self.forward.part_of(phase)
        return Form(kind, part, pending, self.columns, head, is_limited, phase, some, width if is_narrow else None)

    def _send(self, form: Form) -> Form:
        self._sent.append(form)
        return form
