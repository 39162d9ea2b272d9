# SPDX-License-Identifier: Apache-2.0
"""Capture and replay of a program's steps: each form of a step is recorded once, model and head included.

Replaying a step costs the host one call instead of hundreds. A step can be recorded if it reads nothing on the host and
writes only into tensors that are never replaced. The steps of all programs do so (docs/programs.md). If a model's
forward pass does not, its steps run without recording.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from .programs import Program

#: whether steps are recorded: where possible; always, or raise an error; never
GRAPHS = ("auto", True, False)
#: steps of a form that run before it is recorded, so that everything a first run allocates already exists
WARM_UP = 2


class Recording(Protocol):
    """A recorded step, which can be replayed.

    Attributes
    ----------
    report : Tensor
        The step's report. Each replay overwrites this tensor.
    """

    report: Tensor

    def replay(self) -> None:
        """Run the step again."""


class Recorder(Protocol):
    """Records steps."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Recording, bool]:
        """Record the step; return the recording, and whether recording it has also run it."""


class Steps:
    """Runs the steps of a program directly, without recording them."""

    def __init__(self, program: Program, is_widest: bool = False):
        """`is_widest`: use forms whose shapes suit any rows, so that results do not depend on the other rows."""
        self.program, self._is_widest = program, is_widest or program.model.is_compiled
        self._step = program.step

    def __call__(self, form: Any) -> Tensor:
        """Run a step of that form, and return its report."""
        return self._step(self.program.widest(form) if self._is_widest else form)

    def install(self) -> None:
        """Replace the program's `step` by this object."""
        self.program.__dict__["step"] = self


class RecordedSteps(Steps):
    """Records the steps of a program, one recording per form, and replays them.

    Attributes
    ----------
    replayed, made : int
        Number of steps replayed, and number of steps run in total.
    refusal : str, optional
        Why recording failed, after which no step is recorded; None if it has not failed.
    """

    def __init__(self, program: Program, recorder: Recorder, must: bool = False):
        """`must`: raise an error if a step cannot be recorded, instead of running it without."""
        super().__init__(program, True)
        self._recorder, self._must = recorder, must
        self._recordings: dict[Hashable, Recording] = {}
        self._looked_at: dict[Hashable, Any] = {}
        self._seen: dict[Hashable, int] = {}
        self.replayed = self.made = 0
        self.refusal: str | None = None

    def __call__(self, form: Any) -> Tensor:
        form = key = self.program.widest(form)
        self.made += 1
        if key in self._recordings:
            self.replayed += 1
            return self._replay(key)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self.refusal is not None or self._seen[key] <= WARM_UP:
            return self._step(form)
        try:
            recording, was_run = self._recorder.record(lambda: self._step(form))
        except Exception as error:
            self._refuse(error)
            return self._step(form)
        self._recordings[key] = recording
        self._looked_at[key] = self.program.unfinished.last
        return recording.report if was_run else self._replay(key)

    def _replay(self, key: Hashable) -> Tensor:
        recording = self._recordings[key]
        recording.replay()
        self.program.unfinished.last = self._looked_at[key]
        return recording.report

    def _refuse(self, error: Exception) -> None:
        """Stop recording after an error: warn, or raise if recording is required."""
        self.refusal = " ".join(str(error).split())[:200] or type(error).__name__
        if self._must:
            raise ValueError(f"graphs=True: a step of this decoding cannot be captured: {self.refusal}") from error
        warnings.warn(
            f"steps run without CUDA graphs, since one could not be captured: {self.refusal}",
            RuntimeWarning,
            stacklevel=3,
        )


class CudaRecording:
    """A step captured as a CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, report: Tensor):
        self._graph, self.report = graph, report

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Captures steps as CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None

    def record(self, step: Callable[[], Tensor]) -> tuple[CudaRecording, bool]:
        """Capture the step, which runs nothing on the device."""
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # other threads may use the device in the meantime
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                report = step()
            self._pool = graph.pool() if self._pool is None else self._pool
        return CudaRecording(graph, report), False


def check_graphs(graphs: Any) -> None:
    """Raise a ValueError unless `graphs` is one of `GRAPHS`."""
    if not (graphs is True or graphs is False or (isinstance(graphs, str) and graphs == "auto")):
        raise ValueError(f"graphs must be 'auto', True or False; got {graphs!r}")


def steps_of(program: Program, graphs: Any = "auto", is_widest: bool = False) -> Steps:
    """Return the object that runs the steps of a program. `graphs` is one of `GRAPHS`; `is_widest` as in `Steps`.

    Raises
    ------
    ValueError
        If graphs=True and the steps cannot be captured.
    """
    check_graphs(graphs)
    reason = why_not(program)
    if graphs is False or (graphs == "auto" and reason is not None):
        return Steps(program, is_widest)
    if reason is not None:
        raise ValueError(f"graphs=True: steps cannot be captured, since {reason}")
    return RecordedSteps(program, CudaRecorder(program.state.tokens.device), graphs is True)


def why_not(program: Program) -> str | None:
    """Return why the steps of a program cannot be captured, as far as known in advance; None if nothing prevents it."""
    if program.state.tokens.device.type != "cuda":
        return f"the model is on {program.state.tokens.device.type}, and only CUDA devices have graphs"
    if program.model.is_compiled:
        return "the model is compiled: torch.compile captures its forward passes itself, or not at all"
    if program.model.group is not None:
        return "the model's layers wait for other ranks"
    if getattr(program.model, "_rotaries", None):
        return "the model's rotary frequencies depend on the lengths of the requests"
    return None
