# SPDX-License-Identifier: Apache-2.0
"""Statistics of an evaluation: sums for the results, and optionally one record per request in a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Tally:
    """Sums over requests. Tallies of several processes can be added.

    Attributes
    ----------
    answers, new_tokens, forwards : int
        Number of generated answers, of their tokens up to the first end token or stop string, and of their forwards.
    decoded_tokens : int
        Number of tokens that these forwards committed, including padding and tokens after an end token.
    seconds : float
        Wall-clock time of generation; with several processes, that of the slowest.
    truncated : int
        Number of prompts whose beginning was cut off.
    exact, estimated : int
        Number of exact likelihoods, and of estimated bounds.
    variance : float
        Sum of the squared standard errors of the estimates.
    unknown_errors : int
        Number of estimates from a single sample, whose standard error is unknown.
    """

    answers: int = 0
    new_tokens: int = 0
    forwards: int = 0
    decoded_tokens: int = 0
    seconds: float = 0.0
    truncated: int = 0
    exact: int = 0
    estimated: int = 0
    variance: float = 0.0
    unknown_errors: int = 0

    def __add__(self, other: Tally) -> Tally:
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Tally(**sums | {"seconds": max(self.seconds, other.seconds)})

    def estimate(self, standard_error: float) -> None:
        """Add an estimated likelihood; its standard error may be NaN."""
        self.estimated += 1
        if math.isnan(standard_error):
            self.unknown_errors += 1
        else:
            self.variance += standard_error**2

    def summary(self) -> dict[str, Any]:
        """Return the statistics that go into the results, as plain numbers."""
        out: dict[str, Any] = {}
        if self.answers:
            out |= {
                "answers": self.answers, "new_tokens": self.new_tokens, "forwards": self.forwards,
                "forwards_per_answer": self.forwards / self.answers,
                "tokens_per_forward": self.decoded_tokens / max(self.forwards, 1),
                "new_tokens_per_second": self.new_tokens / max(self.seconds, 1e-9), "seconds": self.seconds,
            }  # fmt: skip
        if self.exact or self.estimated:
            known = self.estimated - self.unknown_errors
            error = math.sqrt(self.variance / known) if known else None
            out |= {
                "likelihoods_exact": self.exact, "likelihoods_estimated": self.estimated,
                "likelihood_standard_error": error,
            }  # fmt: skip
        return out | {"truncated_prompts": self.truncated}


class Records:
    """A JSON Lines file with one record per request. With several processes, each writes its own file."""

    def __init__(self, path: str | None, rank: int = 0, world_size: int = 1):
        self.path = None
        if path is not None:
            self.path = Path(path if world_size == 1 else f"{path}.rank{rank}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def add(self, **entry: Any) -> None:
        """Append a record. NaN, which JSON cannot represent, becomes null."""
        if self.path is None:
            return
        clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in entry.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")
