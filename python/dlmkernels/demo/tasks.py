# SPDX-License-Identifier: Apache-2.0
"""Tasks of the demo model: Sudoku, addition and running sums, as character canvases.

A problem is a *canvas* (prompt plus answer): a string in which every blank is the character ``_``, the text form of
the mask token. One character is one token, so ``canvas[i]`` and ``ids[i]`` always refer to the same position.

=========== ================================================== =====================================
task        canvas                                             difficulty (default)
=========== ================================================== =====================================
sudoku      ``S``, 81 cells in reading order                   number of clues (40)
addition    ``A``, 16 digits, ``+``, 16 digits, ``=``, 17      places whose two digits sum to nine and
            digits; most significant first, zero-padded        so pass on a carry (random)
running-sum ``R``, 32 digits, ``=``, 32 digits:                answer digits left blank (32)
            ``answer[i] = (answer[i-1] + digit[i]) % 10``
=========== ================================================== =====================================

Answers are checked against the rules of the task, not against a stored solution. A Sudoku puzzle is a solved grid with
random cells removed, so its solution may not be unique; any valid completion counts.

Held-out problems
-----------------
A hash of a problem's content (solved grid, pair of summands, or digits to sum) reserves one problem in 64 for
evaluation. ``Task.make`` returns only reserved problems and ``Task.training_rows`` drops all of them, so the two sets
are disjoint for any seeds. In addition, every Sudoku grid for evaluation comes from a search of its own, while training
shuffles a fixed pool of grids by the symmetries of the game.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD, EOS, MASK = "<pad>", "<eos>", "_"
TOKENS: tuple[str, ...] = (PAD, EOS, MASK, *"0123456789", *"SAR+=")
"""Tokens in the order of their ids, as in the tokenizer of the shipped model."""

PAD_ID, EOS_ID, MASK_ID, ZERO_ID = 0, 1, 2, 3
_ID_OF = {token: i for i, token in enumerate(TOKENS)}


def encode(text: str) -> np.ndarray:
    """Return the token ids of a canvas, int64 ``[len(text)]``. Raises ``KeyError`` on a character that is no token."""
    return np.array([_ID_OF[c] for c in text], dtype=np.int64)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids, without padding, end tokens and ids outside the vocabulary."""
    return "".join(TOKENS[i] for i in map(int, ids) if EOS_ID < i < len(TOKENS))


@dataclass(frozen=True)
class Problem:
    """One problem. ``canvas`` has ``_`` for each blank; its first ``prompt_length`` characters are the prompt."""

    task: str
    canvas: str
    prompt_length: int

    @property
    def ids(self) -> np.ndarray:
        """Token ids of the canvas, int64 ``[T]``."""
        return encode(self.canvas)

    @property
    def prompt(self) -> str:
        """The leading part of the canvas, which contains no blanks."""
        return self.canvas[: self.prompt_length]

    @property
    def answer(self) -> str:
        """The rest of the canvas: blanks and the given cells or digits between them."""
        return self.canvas[self.prompt_length :]

    @property
    def blanks(self) -> np.ndarray:
        """Positions of the blanks in the canvas, int64 ``[number of blanks]``."""
        return np.flatnonzero(self.ids == MASK_ID)


class Task:
    """A task, which makes held-out problems and training rows, checks answers and renders canvases.

    Attributes
    ----------
    name, letter : str
        Key in ``TASKS``, and first character of every canvas.
    length : int
        Number of characters in a canvas.
    prompt_length : int
        Number of leading characters that are never blank. Any character after them may be.
    """

    name: str
    letter: str
    length: int
    prompt_length: int

    def make(self, n: int, seed: int = 0, difficulty: int | None = None) -> list[Problem]:
        """Return ``n`` held-out problems, determined by the arguments. The module docstring explains ``difficulty``."""
        rng = np.random.default_rng([seed, ord(self.letter)])
        return [
            Problem(self.name, self.letter + canvas, self.prompt_length) for canvas in self._make(n, rng, difficulty)
        ]

    def check(self, problem: Problem, text: str) -> bool:
        """Return whether ``text``, a filled canvas, keeps the given characters and obeys the rules of the task."""
        if len(text) != self.length or any(given not in (MASK, c) for given, c in zip(problem.canvas, text)):
            return False
        answer = text[self.prompt_length :]
        return all("0" <= c <= "9" for c in answer) and self._valid(text[1 : self.prompt_length], answer)

    def training_rows(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return token ids of ``n`` complete canvases, none of them held out, int64 ``[n, length]``."""
        rows = np.empty((0, self.length), dtype=np.int64)
        while len(rows) < n:
            rows = np.concatenate([rows, self._rows(n + n // 16 + 1, rng)])
        return rows[:n]

    def render(self, text: str) -> str:
        """Lay out a canvas, filled or not, for display."""
        raise NotImplementedError

    def _make(self, n: int, rng: np.random.Generator, difficulty: int | None) -> list[str]:
        raise NotImplementedError

    def _valid(self, question: str, answer: str) -> bool:
        raise NotImplementedError

    def _rows(self, n: int, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


class Sudoku(Task):
    """9×9 Sudoku: each row, column and 3×3 box contains 1–9 once. Difficulty: number of clues, 0–81."""

    name, letter, length, prompt_length = "sudoku", "S", 82, 1
    pool_size = 32768
    """Number of grids found by search for training. Their symmetries (about 10¹² each) give all other grids."""

    def __init__(self) -> None:
        self._pool: np.ndarray | None = None

    def _make(self, n: int, rng: np.random.Generator, difficulty: int | None) -> list[str]:
        clues = 40 if difficulty is None else difficulty
        if not 0 <= clues <= 81:
            raise ValueError(f"difficulty of sudoku must be a number of clues from 0 to 81; got {clues}")
        search = random.Random(int(rng.integers(1 << 62)))
        canvases: list[str] = []
        while len(canvases) < n:
            grids = shuffle_grids(np.repeat(search_grid(search)[None], 256, 0), rng)
            reserved = grids[held_out(grids)]
            if len(reserved):
                cells = [str(d) for d in reserved[0]]
                for i in rng.random(81).argsort()[clues:]:
                    cells[i] = MASK
                canvases.append("".join(cells))
        return canvases

    def _valid(self, question: str, answer: str) -> bool:
        grid = np.array([int(c) for c in answer]).reshape(9, 9)
        boxes = grid.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
        return all((np.sort(part, axis=1) == np.arange(1, 10)).all() for part in (grid, grid.T, boxes))

    def _rows(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self._pool is None:
            search = random.Random("training grids")
            self._pool = np.stack([search_grid(search) for _ in range(self.pool_size)])
        grids = shuffle_grids(self._pool[rng.integers(len(self._pool), size=n)], rng)
        return _with_letter("S", grids[~held_out(grids)] + ZERO_ID)

    def render(self, text: str) -> str:
        lines = []
        for r in range(9):
            row = text[1 + 9 * r : 10 + 9 * r].replace(MASK, "·")
            lines.append(" │ ".join(" ".join(row[c : c + 3]) for c in (0, 3, 6)))
        bar = "──────┼───────┼──────"
        return "\n".join([*lines[:3], bar, *lines[3:6], bar, *lines[6:]])


class Addition(Task):
    """Two 16-digit numbers and their 17-digit sum. Difficulty: number of places whose digits sum to nine, 0–16.

    Such a place passes on the carry it receives, so in a run of them distant digits of the answer depend on each other.
    """

    name, letter, digits = "addition", "A", 16
    length, prompt_length = 3 * digits + 4, 2 * digits + 3

    def _make(self, n: int, rng: np.random.Generator, difficulty: int | None) -> list[str]:
        if difficulty is not None and not 0 <= difficulty <= self.digits:
            raise ValueError(f"difficulty of addition must be from 0 to {self.digits} places; got {difficulty}")
        canvases: list[str] = []
        while len(canvases) < n:
            pairs = rng.integers(10, size=(64, 2 * self.digits))
            if difficulty is not None:
                nine = rng.random((64, self.digits)).argsort(1) < difficulty
                self._set_nines(pairs, nine)
                # Everywhere else the digits must not sum to nine: where they do, add one to the second.
                a, b = pairs[:, : self.digits], pairs[:, self.digits :]
                b += (a + b == 9) & ~nine
                b %= 10
            for pair in pairs[held_out(pairs)]:
                text = "".join(map(str, pair))
                canvases.append(f"{text[: self.digits]}+{text[self.digits :]}={MASK * (self.digits + 1)}")
        return canvases[:n]

    def _set_nines(self, pairs: np.ndarray, where: np.ndarray) -> None:
        a, b = pairs[:, : self.digits], pairs[:, self.digits :]
        b[where] = 9 - a[where]

    def _valid(self, question: str, answer: str) -> bool:
        a, b = question.rstrip("=").split("+")
        return int(a) + int(b) == int(answer)

    def _rows(self, n: int, rng: np.random.Generator) -> np.ndarray:
        pairs = rng.integers(10, size=(n, 2 * self.digits))
        # Half of the rows get extra places that sum to nine, up to all 16, because long carries are rare by chance.
        share = np.maximum(0.0, 2 * rng.random((n, 1)) - 1)
        self._set_nines(pairs, rng.random((n, self.digits)) < share)
        pairs = pairs[~held_out(pairs)]
        a, b = pairs[:, : self.digits], pairs[:, self.digits :]
        total = np.zeros((len(pairs), self.digits + 1), dtype=np.int64)
        total[:, 1:] = a + b
        for i in range(self.digits, 0, -1):
            total[:, i - 1] += total[:, i] // 10
            total[:, i] %= 10
        plus, equals = (np.full((len(pairs), 1), _ID_OF[c]) for c in "+=")
        return _with_letter("A", np.hstack([a + ZERO_ID, plus, b + ZERO_ID, equals, total + ZERO_ID]))

    def render(self, text: str) -> str:
        d = self.digits
        a, b, total = text[1 : d + 1], text[d + 2 : 2 * d + 2], text[2 * d + 3 :]
        return f"  {a}\n+ {b}\n= {total}".replace("= ", "=").replace(MASK, "·")


class RunningSum(Task):
    """Running sums mod 10 of 32 digits: each answer digit depends on the previous one. Difficulty: blanks, 1–32."""

    name, letter, digits = "running-sum", "R", 32
    length, prompt_length = 2 * digits + 2, digits + 2

    def _make(self, n: int, rng: np.random.Generator, difficulty: int | None) -> list[str]:
        blank = self.digits if difficulty is None else difficulty
        if not 1 <= blank <= self.digits:
            raise ValueError(f"difficulty of running-sum must be from 1 to {self.digits} blanks; got {blank}")
        canvases: list[str] = []
        while len(canvases) < n:
            values = rng.integers(10, size=(64, self.digits))
            for digits in values[held_out(values)]:
                answer = [str(d) for d in digits.cumsum() % 10]
                for i in rng.random(self.digits).argsort()[:blank]:
                    answer[i] = MASK
                canvases.append("".join(map(str, digits)) + "=" + "".join(answer))
        return canvases[:n]

    def _valid(self, question: str, answer: str) -> bool:
        total, right = 0, True
        for digit, given in zip(question.rstrip("="), answer):
            total = (total + int(digit)) % 10
            right &= total == int(given)
        return right

    def _rows(self, n: int, rng: np.random.Generator) -> np.ndarray:
        digits = rng.integers(10, size=(n, self.digits))
        digits = digits[~held_out(digits)]
        equals = np.full((len(digits), 1), _ID_OF["="])
        return _with_letter("R", np.hstack([digits + ZERO_ID, equals, digits.cumsum(1) % 10 + ZERO_ID]))

    def render(self, text: str) -> str:
        question, answer = text[1:].split("=")
        return f"{question}\n{answer}".replace(MASK, "·")


def held_out(contents: np.ndarray) -> np.ndarray:
    """Return which rows of digits ``[n, k]`` are reserved for evaluation, bool ``[n]``: a fixed hash picks 1 in 64."""
    with np.errstate(over="ignore"):  # arithmetic mod 2^64, finished with the mixing function of splitmix64
        weights = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, contents.shape[1] + 1, dtype=np.uint64)
        h = (contents.astype(np.uint64) * weights).sum(1, dtype=np.uint64)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (h >> np.uint64(58)) == 0


def search_grid(rng: random.Random) -> np.ndarray:
    """Return a random solved 9×9 grid, digits 1–9, int64 ``[81]``.

    The search is depth-first and fills the cell with the fewest choices first.
    """
    rows, cols, boxes = [0x1FF] * 9, [0x1FF] * 9, [0x1FF] * 9  # bit d set: digit d + 1 is still free
    grid = [0] * 81
    empty = set(range(81))

    def fill() -> bool:
        if not empty:
            return True
        best, options = -1, 0
        fewest = 10
        for cell in empty:
            r, c = divmod(cell, 9)
            free = rows[r] & cols[c] & boxes[r // 3 * 3 + c // 3]
            count = free.bit_count()
            if count < fewest:
                best, options, fewest = cell, free, count
                if count <= 1:
                    break
        r, c = divmod(best, 9)
        b = r // 3 * 3 + c // 3
        digits = [d for d in range(9) if options >> d & 1]
        rng.shuffle(digits)
        empty.discard(best)
        for d in digits:
            bit = 1 << d
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
            grid[best] = d + 1
            if fill():
                return True
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
        empty.add(best)
        return False

    fill()
    return np.array(grid, dtype=np.int64)


def shuffle_grids(grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a random symmetry of Sudoku to each solved grid, int64 ``[n, 81]`` to ``[n, 81]``.

    This relabels the digits, permutes the bands, the stacks, the rows within a band and the columns within a stack,
    and transposes half of the grids.
    """
    n = len(grids)

    def lines() -> np.ndarray:  # a permutation of the nine rows (or columns) that keeps bands together
        bands = rng.random((n, 3)).argsort(1)
        within = rng.random((n, 3, 3)).argsort(2)
        return (3 * bands[:, :, None] + within).reshape(n, 9)

    cells = 9 * lines()[:, :, None] + lines()[:, None, :]
    flip = rng.random(n) < 0.5
    cells[flip] = cells[flip].swapaxes(1, 2)
    labels = rng.random((n, 9)).argsort(1) + 1
    shuffled = np.take_along_axis(grids, cells.reshape(n, 81), 1)
    return np.take_along_axis(labels, shuffled - 1, 1)


def _with_letter(letter: str, rows: np.ndarray) -> np.ndarray:
    return np.hstack([np.full((len(rows), 1), _ID_OF[letter], dtype=np.int64), rows])


TASKS: dict[str, Task] = {task.name: task for task in (Sudoku(), Addition(), RunningSum())}


def check_text(name: str, text: str) -> None:
    """Raise ValueError unless the model knows all characters of `text`. The message calls the text `name`."""
    known = "".join(TOKENS[MASK_ID:])
    if unknown := "".join(sorted(set(text) - set(known))):
        raise ValueError(
            f"{name} contains {unknown!r}: the demo model knows only the characters {known}. It answers prompts such "
            "as A1234567890123456+8765432109876544= (addition, 16 digits each) and R, 32 digits, = (running sums). "
            "It fills in Sudokus written as S and 81 cells, with _ for a blank"
        )


def answer_length(prompt: str) -> int:
    """Return how many tokens the answer to a prompt has: up to the end of its task's canvas, at least 1."""
    length = next((task.length for task in TASKS.values() if prompt.startswith(task.letter)), len(prompt) + 1)
    return max(length - len(prompt), 1)
