# SPDX-License-Identifier: Apache-2.0
"""The host's part of a decoding whose rows enter their blocks by themselves: which form the next step has.

What a row needs of a forward is its phase, which the device finds out and reports. A step takes the rows of one phase,
and no more of them than its form says.
"""

from __future__ import annotations

from collections import deque

from ..block_forward import APPEND, BlockForward
from ..config import DecodingConfig
from .block_forms import Form

#: Widths of a canvas that steps may have are multiples of this.
GRAIN = 16


class RowForms:
    """Finds the form of the next step from reports of earlier ones.

    A report holds three numbers for each of S rows, all of the first kind coming first. How many positions of its block
    are open, at least 1 while it is in one; 0 if it waits to enter another; -1 if nothing is left. Its phase. How many
    columns besides the block's own a forward in this phase has to take of it.

    Parameters
    ----------
    least_steps : int
        After how many steps a block ends, of whatever length it is.
    forward : BlockForward
    slots : int
        How many slots the window of a row has.
    may_be_few : bool
        Whether a forward may take some of the rows. False: all that there are, whatever they need, so that the width of
        its matrix products is always the same.
    """

    def __init__(self, config: DecodingConfig, least_steps: int, forward: BlockForward, slots: int, may_be_few: bool):
        self.forward, self.slots, self.may_be_few = forward, slots, may_be_few
        self.least_steps = least_steps
        #: whether the rows are told apart by what they need, even where all are forwarded
        self.has_phases = config.cache != "none" or forward.commits_apart
        self.columns = forward.columns_of(None)
        #: the phase in which a row stays until its block is done, unless it is refreshed
        self.usual = forward.usual_phase

    def begin(self, ends: list[int]) -> None:
        """Nothing is known yet of the rows, whose requests end at these columns, but that all have entered a block."""
        self.ends = ends
        #: forms of the steps whose reports are not known
        self._sent: deque[Form] = deque()
        #: how many steps each row has taken in its block, or more; whether the last forward was not the usual
        self._taken = [0] * len(ends)
        self._was_special = False

    def renew(self, rows: list[int], ends: list[int]) -> None:
        """Rows hold other requests now, which end at these columns."""
        for row, end in zip(rows, ends, strict=True):
            self.ends[row] = end

    def next(self, report: tuple[int, ...], behind: int) -> Form | None:
        """The form of the next step, None if there is nothing left to do."""
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
        """The phase whose rows are next; None if it has to be seen first what the steps under way have made of them.

        Prompts and refreshed rows go first, but not twice in a row before the others.
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
        # What is not known yet of rows that have come into the phase may be as much as there can be.
        head = taking * self.slots if self._sent else min(num_open, count * self.slots)
        is_limited = any(self._taken[row] >= self.least_steps for row in rows)
        for row in rows:
            self._taken[row] += 1
        some = taking if self.has_phases or taking < count else None
        # Where all rows are taken, those are too that have come into a block since the report.
        ends = self.ends if some is None else [self.ends[row] for row in rows]
        width = -(-max(ends) // GRAIN) * GRAIN
        is_narrow = self.forward.takes_canvas(phase) and self.forward.rows_change and width < self.forward.length
        kind = "append" if phase == APPEND and self.forward.commits_apart else "denoise"
        part = self.forward.part_of(phase)
        return Form(kind, part, pending, self.columns, head, is_limited, phase, some, width if is_narrow else None)

    def _send(self, form: Form) -> Form:
        self._sent.append(form)
        return form
